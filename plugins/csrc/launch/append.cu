#include "../kernels/append_rows.cuh"
#include "../kernels/quantize_generic.cuh"
#include "../kernels/quantize_registers.cuh"
#include "../kernels/workspace.cuh"
#include "internal.h"

namespace vkvx {

namespace {

template <int kSteps, int kHeld, int kBlocks>
int quantize_in_registers(const VkvxParams& p, const Device& device, cudaStream_t stream) {
  const int parts = p.visual_entries / p.group_size * (p.head_dim / 32);
  const int bytes = p.group_size * kQuantizeWarps * static_cast<int>(sizeof(uint4));
  if (cudaFuncSetAttribute(quantize_registers_kernel<kSteps, kHeld, kBlocks>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return check_cuda("the shared memory that quantisation needs");
  Launch(device, stream)(quantize_registers_kernel<kSteps, kHeld, kBlocks>,
                         dim3(2 * parts, p.kv_heads, p.rows), kQuantizeWarps * 32, bytes, p,
                         shape_workspace(p));
  return check_cuda("quantisation");
}

int quantize(const VkvxParams& p, const Device& device, cudaStream_t stream) {
  if (device.capability >= 80 && p.dtype != VKVX_FLOAT32 && rows_are_aligned(p.key, p.key_stride) &&
      rows_are_aligned(p.value, p.value_stride)) {
    if (p.group_size <= 256) return quantize_in_registers<8, 6, 7>(p, device, stream);
    if (p.group_size <= 640) return quantize_in_registers<20, 12, 5>(p, device, stream);
    if (p.group_size <= 896) return quantize_in_registers<28, 12, 4>(p, device, stream);
    if (p.group_size <= 1024) return quantize_in_registers<32, 20, 3>(p, device, stream);
  }
  const int wanted = p.group_size * kChannels * static_cast<int>(sizeof(float)), statics = 8192;
  const bool cached = wanted + statics <= device.shared_memory;
  const int bytes = cached ? wanted : 0;
  if (cudaFuncSetAttribute(quantize_generic_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           bytes) != cudaSuccess)
    return check_cuda("the shared memory that quantisation needs");
  const int parts = p.visual_entries / p.group_size * (p.head_dim / 32);
  Launch(device, stream)(quantize_generic_kernel, dim3(2 * parts, p.kv_heads, p.rows),
                         kAppendWarps * 32, bytes, p, shape_workspace(p), cached);
  return check_cuda("quantisation");
}

}  // namespace

int append(const VkvxParams& p, const Device& device, cudaStream_t stream) {
  const bool packed = p.key_bits != 16;
  const int threads = 256, parts = (p.kv_heads * p.head_dim + threads - 1) / threads;
  if (!packed) {
    const Workspace workspace(p, 0, 1, 0);
    rank_tokens(p, workspace.rank, nullptr, stream);
    append_rows_kernel<<<dim3(p.positions, p.rows, parts), threads, 0, stream>>>(p, workspace.rank);
    return check_cuda("append of text rows");
  }
  if (p.text_entries && p.text_capacity) {
    if (p.text_bits == 8)
      append_code_rows_kernel<<<dim3(p.text_entries, p.rows,
                                     divide_up(2 * p.kv_heads, kCodeRowWarps)),
                                kCodeRowWarps * 32, 0, stream>>>(p);
    else
      append_rows_kernel<<<dim3(p.text_entries, p.rows, parts), threads, 0, stream>>>(p, nullptr);
    if (const int code = check_cuda("append of text rows")) return code;
  }
  if (p.visual_entries == 0 || p.visual_capacity == 0) return VKVX_OK;
  if (p.quantizer != VKVX_SHAPED) return quantize(p, device, stream);
  if (const int code = read_metrics(p, stream)) return code;
  if (const int code = quantize(p, device, stream)) return code;  // levels alone
  return shape(p, device, stream);
}

}  // namespace vkvx
