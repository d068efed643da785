// What libvkvx and CUDA do for the custom operator of onnxruntime, on a CPU: calls go to a function of the test.
#include <cuda_runtime_api.h>

#include <cstring>

#include "vkvx.h"

namespace {
int (*step)(const VkvxParams*, int appends) = nullptr;
constexpr size_t kWorkspace = 1000, kZeroed = 24;
}  // namespace

extern "C" {

void set_step(int (*given)(const VkvxParams*, int)) { step = given; }

const char* vkvx_last_error(void) { return "the stub refuses this"; }
int vkvx_workspace_bound(const VkvxParams* params, size_t* bytes) {
  *bytes = kWorkspace;
  return params->group_size % 128 ? VKVX_UNSUPPORTED : VKVX_OK;
}
int vkvx_workspace_bytes(const VkvxParams* params, size_t* bytes) { return vkvx_workspace_bound(params, bytes); }
int vkvx_workspace_zeroed(const VkvxParams*, size_t* bytes) {
  *bytes = kZeroed;
  return VKVX_OK;
}
int vkvx_step(const VkvxParams* params, void*) {
  const int code = step(params, 1);
  std::memset(params->workspace, 0xff, params->workspace_bytes);  // whoever gets it next shall not find zeros
  return code;
}
int vkvx_attention(const VkvxParams* params, void*) { return step(params, 0); }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
}
