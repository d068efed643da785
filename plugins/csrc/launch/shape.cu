#include "../kernels/shape.cuh"
#include "internal.h"

namespace vkvx {

namespace {

template <class Errors>
int launch(const VkvxParams& p, const ShapeWorkspace& workspace, const Device& device,
           cudaStream_t stream) {
  int warps = kShapeWarps;
  while (warps > 1 && shape_shared<Errors>(p.head_dim, warps) + 1024 > device.shared_memory)
    warps /= 2;
  const int bytes = shape_shared<Errors>(p.head_dim, warps);
  const bool one = p.key_bits == 1 && p.value_bits == 1;
  auto kernel = one ? shape_kernel<Errors, 1> : shape_kernel<Errors, 8>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) !=
      cudaSuccess)
    return check_cuda("the shared memory that shaping needs");
  Launch after(device, stream);
  after(kernel, dim3(2 * (p.visual_entries / (32 * warps)), p.kv_heads, p.rows), 32 * warps, bytes,
        p, workspace);
  if (const int code = check_cuda("shaping")) return code;
  after(shape_finish_kernel, dim3(2 * (p.visual_entries / p.group_size), p.kv_heads, p.rows), 128,
        0, p, workspace);
  return check_cuda("the error of shaping");
}

}  // namespace

size_t append_workspace(const VkvxParams& p) {
  const bool shaped = p.quantizer == VKVX_SHAPED && p.key_bits != 16 && p.visual_entries > 0;
  return plain_workspace(p) + (shaped ? ShapeWorkspace(p, nullptr).bytes : 0);
}

int read_metrics(const VkvxParams& p, cudaStream_t stream) {
  shape_metric_kernel<<<dim3(2 * p.head_dim / kSet, p.kv_heads, p.rows), p.head_dim, 0, stream>>>(
      p, shape_workspace(p));
  return check_cuda("the metrics of shaping");
}

int shape(const VkvxParams& p, const Device& device, cudaStream_t stream) {
  const ShapeWorkspace workspace = shape_workspace(p);
  const bool aligned = p.dtype != VKVX_FLOAT32 && rows_are_aligned(p.key, p.key_stride) &&
                       rows_are_aligned(p.value, p.value_stride);
  if (!aligned) return launch<SharedErrors<false>>(p, workspace, device, stream);
  if (device.capability >= 80) {
    if (p.head_dim == 32) return launch<RegisterErrors<1>>(p, workspace, device, stream);
    if (p.head_dim == 64) return launch<RegisterErrors<2>>(p, workspace, device, stream);
    if (p.head_dim == 96) return launch<RegisterErrors<3>>(p, workspace, device, stream);
    if (p.head_dim == 128) return launch<RegisterErrors<4>>(p, workspace, device, stream);
  }
  return launch<SharedErrors<true>>(p, workspace, device, stream);
}

}  // namespace vkvx
