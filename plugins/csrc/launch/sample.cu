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

int last_tokens(int rows, const int32_t* slot, const int32_t* last_token, int32_t* input_ids,
                cudaStream_t stream) {
  constexpr int kThreads = 128;
  const auto blocks = static_cast<unsigned>(divide_up(rows, kThreads));
  last_tokens_kernel<<<blocks, kThreads, 0, stream>>>(rows, slot, last_token, input_ids);
  return check_cuda("feeding tokens");
}

}  // namespace vkvx
