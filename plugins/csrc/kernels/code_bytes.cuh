// Codes of 1 to 8 bits as bytes, for the INT8 tensor cores.
//
// A word holds 32 codes' bits of one plane. Planes of one word are first merged so that each code
// becomes a field of adjacent bits (nothing to do at 1 bit); `field word & mask` is then four codes
// in four bytes, times a power of two, and the inverse of that power goes into the other operand:
// the query for scores, the weights for values. So a register of the codes' operand costs one logic
// instruction.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace vkvx {

// What the engines on codes as bytes have in common: bits and channels, of the instance or, with
// kBits 0, of the call, and how far apart the weights of a segment may be.
template <int kBits, int kDim>
struct CodeShape {
  static constexpr bool kAny = kBits == 0, kSnaps = true;
  static constexpr int kPaddedDim = kDim;
  static constexpr int kPlanes = kAny ? 8 : kBits;  // most planes of keys or values
  static constexpr int kSegmentTiles = 128;         // sums of more could leave 32 bits
  static constexpr float kWeight = 15.0f;           // a weight of 2^0 is stored as 2^15
  static constexpr float kAbove = 0.99f, kBelow = 5.0f;
  static constexpr float kMagic = 12582912.0f;  // integers in the low bits of floats
  static constexpr int kMagicBits = 0x4b400000;

  int key_bits, value_bits, dim;

  __device__ __forceinline__ explicit CodeShape(const VkvxParams& p)
      : key_bits(p.key_bits), value_bits(p.value_bits), dim(p.head_dim) {}

  __device__ __forceinline__ static int lane() { return threadIdx.x & 31; }
  __device__ __forceinline__ int head_dim() const {
    if constexpr (!kAny) return kPaddedDim;
    int d = dim;
    asm volatile(""
                 : "+r"(d));  // or the compiler takes the addresses of all bits out of the loop,
                              // and runs out of registers
    return d;
  }
  __device__ __forceinline__ int bits_of_keys() const { return kAny ? key_bits : kBits; }
  __device__ __forceinline__ int bits_of_values() const { return kAny ? value_bits : kBits; }

  // Calls f(std::integral_constant<int, bits>); `bits` is of the call.
  template <class F>
  static __device__ __forceinline__ void with_bits(int bits, const F& f) {
    if constexpr (kAny) {
      switch (bits) {
        case 1:
          return f(std::integral_constant<int, 1>{});
        case 2:
          return f(std::integral_constant<int, 2>{});
        case 4:
          return f(std::integral_constant<int, 4>{});
        default:
          return f(std::integral_constant<int, 8>{});
      }
    } else {
      f(std::integral_constant<int, kBits>{});
    }
  }
};

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
