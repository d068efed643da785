// Which kernel takes a call, and the plain one.
#include "../kernels/plain.cuh"
#include "../kernels/workspace.cuh"
#include "internal.h"

#include <algorithm>

namespace vkvx {

namespace {

int queries_of_head(const VkvxParams& p) { return p.query_heads / p.kv_heads * p.positions; }

// Query vectors that `codes` takes at a time. Sums of eight of wide heads do not fit registers.
int columns_of_codes(const VkvxParams& p) {
  return p.head_dim > 128 || queries_of_head(p) <= 4 ? 4 : 8;
}

// Columns of a block, and blocks that a decode needs for each part: as decode_codes and
// decode_planes launch them.
int columns_of(const VkvxParams& p, int kernel) {
  return kernel == VKVX_PLANES ? planes_columns(p) : columns_of_codes(p);
}
int64_t tiles_of(const VkvxParams& p, int kernel) {
  return static_cast<int64_t>(p.rows) * p.kv_heads *
         divide_up(queries_of_head(p), columns_of(p, kernel));
}

}  // namespace

bool rows_are_aligned(const void* data, const int64_t (&stride)[3]) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[0] % 8 == 0 && stride[1] % 8 == 0 &&
         stride[2] % 8 == 0;
}

bool decode_takes(const VkvxParams& p, const Device& device, int kernel) {
  const bool packed = p.key_bits != 16;
  if (device.capability < 80 || p.positions > kMaxDecodePositions || p.dtype == VKVX_FLOAT32)
    return false;
  if (!rows_are_aligned(p.query, p.query_stride) || !rows_are_aligned(p.key, p.key_stride) ||
      !rows_are_aligned(p.value, p.value_stride) || reinterpret_cast<uintptr_t>(p.output) % 8)
    return false;
  // Masks and bounds are in the instances of `codes` for heads of up to 256.
  const bool plain = is_plain(p);
  if (!plain && p.head_dim > 256) return false;
  if (kernel == VKVX_CODES) return true;
  return kernel == VKVX_PLANES && packed && plain && p.head_dim == 128 &&
         p.correction != VKVX_CORRECTION_AFFINE && p.key_bits == p.value_bits && p.key_bits <= 4;
}

int choose_kernel(const VkvxParams& p, const Device& device) {
  if (few_takes(p, device)) return VKVX_FEW;
  // The binary product is native on 8.0 to 9.0. It costs by query vector, the product of codes does
  // not.
  const int few = p.key_bits == 1 ? 2 : 1;
  if (decode_takes(p, device, VKVX_PLANES) && device.capability <= 90 && queries_of_head(p) <= few)
    return VKVX_PLANES;
  if (decode_takes(p, device, VKVX_CODES)) return VKVX_CODES;
  return prefill_takes(p, device) ? VKVX_PREFILL : VKVX_PLAIN;
}

size_t decode_workspace(const VkvxParams& p, const Device& device, int kernel) {
  const int64_t tiles = tiles_of(p, kernel);
  return Workspace(p, tiles, choose_splits(p, tiles, device.processors), columns_of(p, kernel))
      .bytes;
}

size_t decode_zeroed(const VkvxParams& p, const Device& device, int kernel) {
  const int64_t tiles = tiles_of(p, kernel);
  const int splits = choose_splits(p, tiles, device.processors);
  return splits > 1 && !is_clustered(splits, device.capability) ? tiles * sizeof(int) : 0;
}

int planes_columns(const VkvxParams& p) {
  const int queries = queries_of_head(p);
  return p.key_bits > 1 || queries == 1 ? 1 : queries == 2 ? 2 : 4;
}

size_t bound_of_workspace(const VkvxParams& p) {
  return std::max(workspace_bound(p, kMostProcessors), append_workspace(p));
}

int decode(const VkvxParams& p, const Device& device, int kernel, bool appends,
           cudaStream_t stream) {
  if (kernel == VKVX_PLANES) return decode_planes(p, device, appends, stream);
  return columns_of_codes(p) == 4 ? decode_codes<4>(p, device, appends, stream)
                                  : decode_codes<8>(p, device, appends, stream);
}

size_t plain_workspace(const VkvxParams& p) { return Workspace(p, 0, 1, 0).bytes; }

void rank_tokens(const VkvxParams& p, int* rank, int* run_end, cudaStream_t stream) {
  rank_tokens_kernel<<<p.rows, 1024, 0, stream>>>(p, rank, run_end);
}

int plain(const VkvxParams& p, cudaStream_t stream) {
  const Workspace workspace(p, 0, 1, 0);
  rank_tokens(p, workspace.rank, workspace.run_end, stream);
  plain_kernel<<<dim3(p.positions, p.query_heads, p.rows), kPlainThreads, 0, stream>>>(
      p, workspace.rank, workspace.run_end);
  return check_cuda("plain attention");
}

}  // namespace vkvx
