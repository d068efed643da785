// What the translation units of the library share.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "../operator_table.h"

namespace vkvx {

constexpr int kMostProcessors =
    256;  // multiprocessors that are counted on; a device with more works as one with these

// Facts about the current device.
struct Device {
  int index, processors, capability;  // capability: 90 for 9.0
  int shared_memory;                  // bytes that a block may ask for
};

// Launches kernels that may start before the one ahead of them on the stream has ended, and wait
// for it themselves.
class Launch {
 public:
  Launch(const Device& device, cudaStream_t stream) {
    attributes_[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[0].val.programmaticStreamSerializationAllowed = 1;
    config_.stream = stream;
    config_.attrs = attributes_;
    config_.numAttrs = device.capability >= 90 ? 1 : 0;
  }
  // So many blocks along x are a cluster; from capability 9.0.
  void cluster(int blocks) {
    attributes_[1].id = cudaLaunchAttributeClusterDimension;
    attributes_[1].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    config_.numAttrs = 2;
  }
  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), dim3 grid, int threads, int bytes, Args... args) {
    config_.gridDim = grid;
    config_.blockDim = dim3(threads);
    config_.dynamicSmemBytes = bytes;
    cudaLaunchKernelEx(&config_, kernel, args...);
  }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2]{};
};

int fail(int code, const std::string& message);  // remembers the message, returns the code
int check_cuda(const char* what);                // the launch before this call
const Device& current_device();

// Bytes and launch of decode attention.
bool decode_takes(const VkvxParams& p, const Device& device, int kernel);
int choose_kernel(const VkvxParams& p, const Device& device);
size_t decode_workspace(const VkvxParams& p, const Device& device, int kernel);
size_t decode_zeroed(const VkvxParams& p, const Device& device,
                     int kernel);         // bytes at its start that have to be zero
int planes_columns(const VkvxParams& p);  // query vectors that a block of `planes` takes
// With `appends` the call's text tokens are stored, too.
int decode(const VkvxParams& p, const Device& device, int kernel, bool appends,
           cudaStream_t stream);

// Up to kQueries query vectors of a KV head at a time, 4 or 8.
template <int kQueries>
int decode_codes(const VkvxParams& p, const Device& device, bool appends, cudaStream_t stream);
int decode_planes(const VkvxParams& p, const Device& device, bool appends, cudaStream_t stream);

// Decode of few rows. VKVX_AUTO takes it where there are few.
bool few_takes(const VkvxParams& p, const Device& device);
int few(const VkvxParams& p, const Device& device, bool appends, cudaStream_t stream);

// Fills the token numbers of the workspace.
void rank_tokens(const VkvxParams& p, int* rank, int* run_end, cudaStream_t stream);
size_t append_workspace(const VkvxParams& p);
int append(const VkvxParams& p, const Device& device, cudaStream_t stream);
int read_metrics(const VkvxParams& p, cudaStream_t stream);  // for `shaped`
int shape(const VkvxParams& p, const Device& device,
          cudaStream_t stream);  // after that, and after the levels are stored

int sample(const VkvxSampleParams& p, cudaStream_t stream);
int last_tokens(int rows, const int32_t* slot, const int32_t* last_token, int32_t* input_ids,
                cudaStream_t stream);

bool rows_are_aligned(const void* data, const int64_t (&stride)[3]);  // for copies of 16 bytes
bool prefill_takes(const VkvxParams& p, const Device& device);
int prefill(const VkvxParams& p, cudaStream_t stream);
template <int kDim>
int prefill_heads(const VkvxParams& p, const int* rank, const int* run_end, cudaStream_t stream);

size_t bound_of_workspace(
    const VkvxParams& p);  // of all kernels, these sizes and smaller ones, any device
size_t plain_workspace(const VkvxParams& p);  // what `shaped` needs lies behind it
int plain(const VkvxParams& p, cudaStream_t stream);

}  // namespace vkvx
