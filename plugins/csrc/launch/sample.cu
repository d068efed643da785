#include "../kernels/sample.cuh"
#include "internal.h"

namespace vkvx {

namespace {

template <class T>
int launch(const VkvxSampleParams& p, cudaStream_t stream) {
  sample_kernel<T><<<p.rows, kSampleThreads, 0, stream>>>(p);
  return check_cuda("sampling");
}

}  // namespace

int sample(const VkvxSampleParams& p, cudaStream_t stream) {
  if (p.dtype == VKVX_FLOAT16) return launch<__half>(p, stream);
  if (p.dtype == VKVX_BFLOAT16) return launch<__nv_bfloat16>(p, stream);
  return launch<float>(p, stream);
}

}  // namespace vkvx
