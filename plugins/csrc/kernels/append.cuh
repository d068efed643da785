// What the kernels of append share.
#pragma once

#include "common.cuh"

namespace vkvx {

constexpr float kMagic =
    12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, halves to even, in the low bits

__device__ __forceinline__ float clean(float x) {
  if (isnan(x)) return 0.0f;
  return fminf(fmaxf(x, -kHalfMax), kHalfMax);
}

// Of 8 numbers per lane, one per channel: the sum over lanes, for channel lane / 4.
__device__ __forceinline__ float add_over_lanes(const float (&x)[8]) {
  float y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool up = threadIdx.x & 16;
    y[i] = (up ? x[i + 4] : x[i]) + __shfl_xor_sync(kFull, up ? x[i] : x[i + 4], 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool up = threadIdx.x & 8;
    y[i] = (up ? y[i + 2] : y[i]) + __shfl_xor_sync(kFull, up ? y[i] : y[i + 2], 8);
  }
  const bool up = threadIdx.x & 4;
  float z = (up ? y[1] : y[0]) + __shfl_xor_sync(kFull, up ? y[0] : y[1], 4);
  z += __shfl_xor_sync(kFull, z, 2);
  return z + __shfl_xor_sync(kFull, z, 1);
}

// Evenly spaced levels of `shaped` around the mean of the tokens, within low to high, `wanted`
// apart if there is room.
__device__ __forceinline__ void shaped_levels(float wanted, float mean, float high, int bits,
                                              float* low, float* step) {
  const float top = static_cast<float>((1 << bits) - 1),
              most = (high - *low) / top;  // what the range has room for
  *step = fminf(wanted, most);
  *low = fminf(fmaxf(mean - 0.5f * top * *step, *low), high - top * *step);
}

// Group `first + g` of a slot, of call group g of row b; false if there is nothing to store or no
// group is free.
__device__ __forceinline__ bool place_group(const VkvxParams& p, int b, int g, int* group,
                                            int* count, int* scratch) {
  const int slot = p.slot[b], groups = p.visual_capacity / p.group_size;
  if (threadIdx.x == 0) scratch[0] = scratch[1] = 0;
  __syncthreads();
  int filled = 0, valid = 0;
  if (slot >= 0) {
    for (int i = threadIdx.x; i < groups; i += blockDim.x)
      filled += p.visual_count[static_cast<int64_t>(slot) * groups + i] > 0;
    for (int i = threadIdx.x; i < p.group_size; i += blockDim.x)
      valid += p.visual_index[static_cast<int64_t>(b) * p.visual_entries +
                              static_cast<int64_t>(g) * p.group_size + i] >= 0;
  }
  if (filled) atomicAdd(scratch, filled);
  if (valid) atomicAdd(scratch + 1, valid);
  __syncthreads();
  *group = scratch[0] + g;
  *count = scratch[1];
  return *count > 0 && *group < groups;
}

}  // namespace vkvx
