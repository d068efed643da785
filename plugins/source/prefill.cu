#include "../kernels/prefill.cuh"
#include "../kernels/workspace.cuh"
#include "internal.h"

namespace vkvx {

namespace {

template <int kDim, bool kBfloat>
int launch(const VkvxParams& p, const int* rank, cudaStream_t stream) {
  const int bytes = prefill_shared_bytes(kDim, p.positions);
  auto kernel = prefill_kernel<kDim, kBfloat>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return check_cuda("the shared memory that prefill needs");
  const dim3 grid((p.positions + kPrefillRows - 1) / kPrefillRows, p.query_heads, p.rows);
  kernel<<<grid, kPrefillWarps * 32, bytes, stream>>>(p, rank);
  return check_cuda("prefill attention");
}

template <int kDim>
int launch_type(const VkvxParams& p, const int* rank, cudaStream_t stream) {
  return p.dtype == VKVX_BFLOAT16 ? launch<kDim, true>(p, rank, stream) : launch<kDim, false>(p, rank, stream);
}

}  // namespace

bool prefill_takes(const VkvxParams& p, const Device& device) {
  // `affine` needs the extremes of all scores first: the plain kernel does that.
  const bool affine = p.correction == VKVX_CORRECTION_AFFINE && p.visual_capacity;
  const bool aligned = rows_are_aligned(p.key, p.key_stride) && rows_are_aligned(p.value, p.value_stride) && rows_are_aligned(p.query, p.query_stride);
  return device.capability >= 80 && p.positions <= kPrefillMaxPositions && prefill_shared_bytes(p.head_dim, p.positions) <= device.shared_memory && p.dtype != VKVX_FLOAT32 && !affine && aligned && (p.head_dim == 64 || p.head_dim == 128);
}

int prefill(const VkvxParams& p, cudaStream_t stream) {
  const Workspace workspace(p, 0, 1, 0);
  rank_tokens(p, workspace.rank, stream);
  return p.head_dim == 64 ? launch_type<64>(p, workspace.rank, stream) : launch_type<128>(p, workspace.rank, stream);
}

}  // namespace vkvx
