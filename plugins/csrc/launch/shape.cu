#include "../kernels/shape.cuh"
#include "internal.h"

#include <algorithm>

namespace vkvx {

namespace {

constexpr size_t kMostScratch = size_t{256} << 20;

bool is_shaped(const VkvxParams& p) {
  return p.quantizer == VKVX_SHAPED && p.key_bits != 16 && p.visual_entries > 0;
}

int shape_tokens(const VkvxParams& p) {
  return p.group_size <= 1024 ? 4 : kMostShapedGroup / kShapeThreads;
}

// Blocks that run at a time, each with scratch memory of its own, and bytes of that.
int shape_blocks(const VkvxParams& p, const Device& device, size_t* bytes) {
  const int tokens = shape_tokens(p), threads = shape_threads(p.group_size, tokens);
  *bytes = shape_bytes(threads * tokens, p.head_dim);
  const int64_t groups = int64_t{2} * (p.visual_entries / p.group_size) * p.kv_heads * p.rows;
  const int64_t resident = int64_t{std::max(1, device.processors)} * (kShapeThreads / threads),
                affordable = static_cast<int64_t>(kMostScratch / *bytes);
  return static_cast<int>(std::max<int64_t>(1, std::min({groups, resident, affordable})));
}

template <int kChannels, int kTokens>
int launch(const VkvxParams& p, const Device& device, cudaStream_t stream) {
  const int threads = shape_threads(p.group_size, kTokens),
            bytes = shape_shared(p.head_dim, kChannels, threads);
  if (cudaFuncSetAttribute(shape_kernel<kChannels, kTokens>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return check_cuda("the shared memory that shaping needs");
  char* scratch = static_cast<char*>(p.workspace) + plain_workspace(p);
  size_t scratch_bytes;
  const int blocks = shape_blocks(p, device, &scratch_bytes);
  shape_kernel<kChannels, kTokens><<<blocks, threads, bytes, stream>>>(p, scratch);
  return check_cuda("shaping");
}

}  // namespace

size_t append_workspace(const VkvxParams& p, const Device& device) {
  if (!is_shaped(p)) return plain_workspace(p);
  size_t bytes;
  const int blocks = shape_blocks(p, device, &bytes);
  return plain_workspace(p) + blocks * bytes;
}

int shape(const VkvxParams& p, const Device& device, cudaStream_t stream) {
  return shape_tokens(p) == 4 ? launch<16, 4>(p, device, stream)
                              : launch<8, kMostShapedGroup / kShapeThreads>(p, device, stream);
}

}  // namespace vkvx
