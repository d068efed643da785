// Bit planes of one word as pairs of fp16 numbers.
#pragma once

#include "common.cuh"

namespace vkvx {

__device__ __forceinline__ constexpr int field_shift(int j, int bits) {
  return (j & ~(bits - 1)) & 7;
}

// The planes of a word as pairs: pair j holds codes j and j + 16, times 2^(field_shift(j) - 24), as
// two fp16.
template <int kBits>
struct Pairs {
  uint32_t field[2 * kBits];

  __device__ __forceinline__ void set(const uint32_t (&plane)[kBits]) {
    uint32_t f[kBits];
    if constexpr (kBits == 1) {
      f[0] = plane[0];
    } else {
      constexpr int kHalf = kBits / 2;
      // Merge two sets of fields of kHalf bits into fields of kBits bits.
      constexpr uint32_t kLow = kBits == 2 ? 0x55555555u : kBits == 4 ? 0x33333333u : 0x0f0f0f0fu;
      uint32_t low[kHalf], high[kHalf];
      Pairs<kHalf>::shuffle(reinterpret_cast<const uint32_t (&)[kHalf]>(plane[0]), low);
      Pairs<kHalf>::shuffle(reinterpret_cast<const uint32_t (&)[kHalf]>(plane[kHalf]), high);
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        f[i] = (low[i] & kLow) | ((high[i] << kHalf) & ~kLow);
        f[i + kHalf] = ((low[i] >> kHalf) & kLow) | (high[i] & ~kLow);
      }
    }
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      field[i] = f[i];
      field[kBits + i] = f[i] >> 8;
    }
  }

  static __device__ __forceinline__ void shuffle(const uint32_t (&plane)[kBits],
                                                 uint32_t (&f)[kBits]) {
    Pairs pairs;
    pairs.set(plane);
#pragma unroll
    for (int i = 0; i < kBits; ++i) f[i] = pairs.field[i];
  }

  __device__ __forceinline__ uint32_t operator[](int j) const {
    constexpr uint32_t kTop = (1u << kBits) - 1;
    return field[(j & (kBits - 1)) + (j >> 3) * kBits] &
           ((kTop | kTop << 16) << field_shift(j, kBits));
  }
};

}  // namespace vkvx
