// Codes of 1 to 8 bits as bytes, for the INT8 tensor cores.
//
// A word holds 32 codes' bits of one plane. Planes of one word are first merged so that each code
// becomes a field of adjacent bits (nothing to do at 1 bit); `field word & mask` is then four codes
// in four bytes, times a power of two, and the inverse of that power goes into the other operand:
// the query for scores, the weights for values. So a register of the codes' operand costs one logic
// instruction.
#pragma once

#include "common.cuh"

namespace vkvx {

// Exponent of two that register j of a word is multiplied by.
__host__ __device__ __forceinline__ constexpr int byte_shift(int j, int bits) {
  return j & ~(bits - 1) & 3;
}

// Planes to fields of kBits bits: field word i has codes i, i + kBits, i + 2 kBits, ...
template <int kBits>
__device__ __forceinline__ void merge_planes(const uint32_t* plane, uint32_t* field) {
  if constexpr (kBits == 1) {
    field[0] = plane[0];
  } else {
    constexpr int kHalf = kBits / 2;
    constexpr uint32_t kLow = kBits == 2 ? 0x55555555u : kBits == 4 ? 0x33333333u : 0x0f0f0f0fu;
    uint32_t low[kHalf], high[kHalf];
    merge_planes<kHalf>(plane, low);
    merge_planes<kHalf>(plane + kHalf, high);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      field[i] = (low[i] & kLow) | ((high[i] << kHalf) & ~kLow);
      field[i + kHalf] = ((low[i] >> kHalf) & kLow) | (high[i] & ~kLow);
    }
  }
}

// The codes of a word as bytes: register j holds codes j + {0, 8, 16, 24} times 2^byte_shift(j).
template <int kBits>
struct CodeBytes {
  uint32_t field[kBits], upper[kBits];

  __device__ __forceinline__ void set(const uint32_t (&plane)[kBits]) {
    merge_planes<kBits>(plane, field);
#pragma unroll
    for (int i = 0; i < kBits; ++i) upper[i] = field[i] >> 4;
  }

  __device__ __forceinline__ uint32_t operator[](int j) const {
    const int i = j & (kBits - 1);
    if constexpr (kBits == 8) return field[i];
    constexpr uint32_t kTop = (1u << kBits) - 1;
    return (j & ~(kBits - 1) & 4 ? upper[i] : field[i]) &
           (kTop * 0x01010101u << byte_shift(j, kBits));
  }
};

// Words m of the planes, [bits][4], to the codes of four rows.
template <int kBits>
__device__ __forceinline__ void set_rows(CodeBytes<kBits> (&rows)[4],
                                         const uint32_t (&words)[kBits][4]) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    uint32_t planes[kBits];
#pragma unroll
    for (int p = 0; p < kBits; ++p) planes[p] = words[p][m];
    rows[m].set(planes);
  }
}

}  // namespace vkvx
