#include "../kernels/append.cuh"
#include "../kernels/workspace.cuh"
#include "internal.h"

namespace vkvx {

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
  const int wanted = p.group_size * kChannels * static_cast<int>(sizeof(float)), statics = 8192;
  const bool cached = wanted + statics <= device.shared_memory;
  const int bytes = cached ? wanted : 0;
  if (cudaFuncSetAttribute(quantize_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return check_cuda("the shared memory that quantisation needs");
  const int parts = p.visual_entries / p.group_size * (p.head_dim / 32);
  quantize_kernel<<<dim3(2 * parts, p.kv_heads, p.rows), kAppendWarps * 32, bytes, stream>>>(p, cached);
  return check_cuda("quantisation");
}

}  // namespace vkvx
