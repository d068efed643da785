// What the kernels of append share.
#pragma once

#include "common.cuh"

namespace vkvx {

__device__ __forceinline__ float clean(float x) {
  if (isnan(x)) return 0.0f;
  return fminf(fmaxf(x, -kHalfMax), kHalfMax);
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
