#include "../kernels/append.cuh"
#include "../kernels/shape.cuh"
#include "../kernels/workspace.cuh"
#include "internal.h"

#include <algorithm>

namespace vkvx {

namespace {

constexpr size_t kMostScratch = size_t{256} << 20;

bool is_shaped(const VkvxParams& p) { return p.quantizer == VKVX_SHAPED && p.key_bits != 16 && p.visual_entries > 0; }

int shape_tokens(const VkvxParams& p) { return p.group_size <= 2 * kShapeThreads ? 2 : kMostShapedGroup / kShapeThreads; }

int shape_blocks(const VkvxParams& p, const Device& device) {
  const int64_t groups = int64_t{2} * (p.visual_entries / p.group_size) * p.kv_heads * p.rows;
  const int64_t resident = int64_t{device.processors > 0 ? device.processors : 1} * (kShapeThreads / shape_threads(p.group_size, shape_tokens(p)));
  const int64_t room = static_cast<int64_t>(kMostScratch / shape_bytes(p.group_size, p.head_dim));
  return static_cast<int>(std::max<int64_t>(1, std::min({groups, resident, room})));
}

template <int kChannels, int kTokens>
int shape(const VkvxParams& p, const Device& device, cudaStream_t stream) {
  const int threads = shape_threads(p.group_size, kTokens), bytes = shape_shared(p.head_dim, kChannels, threads);
  if (cudaFuncSetAttribute(shape_kernel<kChannels, kTokens>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return check_cuda("the shared memory that shaping needs");
  char* scratch = static_cast<char*>(p.workspace) + plain_workspace(p);
  shape_kernel<kChannels, kTokens><<<shape_blocks(p, device), threads, bytes, stream>>>(p, scratch);
  return check_cuda("shaping");
}

int quantize(const VkvxParams& p, const Device& device, cudaStream_t stream) {
  const int wanted = p.group_size * kChannels * static_cast<int>(sizeof(float)), statics = 8192;
  const bool cached = wanted + statics <= device.shared_memory;
  const int bytes = cached ? wanted : 0;
  if (cudaFuncSetAttribute(quantize_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return check_cuda("the shared memory that quantisation needs");
  const int parts = p.visual_entries / p.group_size * (p.head_dim / 32);
  quantize_kernel<<<dim3(2 * parts, p.kv_heads, p.rows), kAppendWarps * 32, bytes, stream>>>(p, cached);
  return check_cuda("quantisation");
}

}  // namespace

size_t append_workspace(const VkvxParams& p, const Device& device) {
  return plain_workspace(p) + (is_shaped(p) ? shape_blocks(p, device) * shape_bytes(p.group_size, p.head_dim) : 0);
}

int append(const VkvxParams& p, const Device& device, cudaStream_t stream) {
  const bool packed = p.key_bits != 16;
  const int threads = p.kv_heads * p.head_dim < 256 ? 128 : 256;
  if (!packed) {
    const Workspace workspace(p, 0, 1, 0);
    rank_tokens(p, workspace.rank, stream);
    append_rows_kernel<<<dim3(p.positions, p.rows), threads, 0, stream>>>(p, workspace.rank);
    return check_cuda("append of text rows");
  }
  if (p.text_entries && p.text_capacity) {
    append_rows_kernel<<<dim3(p.text_entries, p.rows), threads, 0, stream>>>(p, nullptr);
    if (const int code = check_cuda("append of text rows")) return code;
  }
  if (p.visual_entries == 0 || p.visual_capacity == 0) return VKVX_OK;
  if (!is_shaped(p)) return quantize(p, device, stream);
  VkvxParams start = p;
  start.quantizer = VKVX_LLOYD;
  if (const int code = quantize(start, device, stream)) return code;
  return shape_tokens(p) == 2 ? shape<32, 2>(p, device, stream) : shape<8, kMostShapedGroup / kShapeThreads>(p, device, stream);
}

}  // namespace vkvx
