// Tiles of cached pictures in shared memory, as the numbers that their codes stand for.
//
// A thread takes whole words. Their planes become pairs of fp16 numbers (pairs.cuh), pairs of two
// neighbours are shuffled into channel order, and one fp16 multiply-add turns two codes into two
// levels: scale, code and offset are fp16 numbers, so the result is rounded once.
#pragma once

#include <type_traits>

#include "pairs.cuh"

namespace vkvx {

constexpr int kPrefillThreads = 128;
constexpr int kPrefillKeys = 64;  // of a tile
// Channels of values that a block takes.
constexpr int prefill_values(int dim) { return dim <= 256 ? dim : 256; }

template <bool kBfloat>
__device__ __forceinline__ uint32_t pack_pair(float x, float y) {
  return kBfloat ? pack_bfloat2(x, y) : pack_half2(x, y);
}

// Byte at which 16-byte chunk `chunk` of a row lies: eight rows' chunks of one number, and the
// chunks of one row, are in different banks. Rows of an odd multiple of 64 bytes alternate between
// the halves of the banks, so that pairs of rows are turned by one amount.
template <int kDim>
__device__ __forceinline__ constexpr int place(int row, int chunk) {
  constexpr int kChunks = kDim / 8;
  return (row * kChunks + (chunk ^ (kChunks % 8 ? row >> 1 & 3 : row & 7))) * 16;
}

__device__ __forceinline__ __half2 as_half2(uint32_t x) { return reinterpret_cast<__half2&>(x); }

// Codes j and j + 16 of a word, as two fp16 numbers.
template <int kBits>
__device__ __forceinline__ __half2 code_pair(const Pairs<kBits>& pairs, int j) {
  // Under the exponent of 1024 the field counts in units: 1024 + code * 2^shift. Both steps are
  // exact.
  const uint32_t shift = field_shift(j, kBits), factor = (15 - shift) << 10,
                 less = 0x8000u | (25 - shift) << 10;
  return __hfma2(as_half2(pairs[j] | 0x64006400u), as_half2(factor * 0x00010001u),
                 as_half2(less * 0x00010001u));
}

// The scale, or as much of it as keeps the greatest level finite: rounding can carry a level a
// little beyond the largest fp16 number.
__device__ __forceinline__ __half finite_scale(__half scale, __half offset, float top) {
  const float o = __half2float(offset);
  return fmaf(top, __half2float(scale), o) <= kHalfMax ? scale
                                                       : __float2half_rz((kHalfMax - o) / top);
}

template <bool kBfloat>
__device__ __forceinline__ uint32_t level_pair(__half2 code, uint32_t scale, uint32_t offset) {
  const __half2 x = __hfma2(code, as_half2(scale), as_half2(offset));
  if constexpr (!kBfloat) return reinterpret_cast<const uint32_t&>(x);
  const float2 y = __half22float2(x);
  return pack_bfloat2(y.x, y.y);
}

// Scales and offsets of a group's keys, as unpack_keys wants them.
template <int kDim>
__device__ __forceinline__ void stage_key_params(__half* to, const __half* params, int bits) {
  for (unsigned c = threadIdx.x; c < kDim; c += kPrefillThreads) {
    to[c] = finite_scale(params[c], params[kDim + c], (1 << bits) - 1);
    to[kDim + c] = params[kDim + c];
  }
}

// Keys of 64 tokens: `words` of the first plane and token, `params` staged in shared memory.
template <int kBits, int kDim, bool kBfloat>
__device__ __forceinline__ void unpack_keys(char* to, const int* words, const __half* params) {
  constexpr int kWords = kDim / 32;
#pragma unroll 1
  for (unsigned q = threadIdx.x; q < kPrefillKeys * kWords; q += kPrefillThreads) {
    const unsigned token = q % kPrefillKeys,
                   word = q / kPrefillKeys;  // the same word in a whole warp
    uint32_t planes[kBits];
#pragma unroll
    for (int p = 0; p < kBits; ++p)
      planes[p] = __ldg(words + p * kTile * kWords + token * kWords + word);
    Pairs<kBits> pairs;
    pairs.set(planes);
#pragma unroll
    for (int j = 0; j < 16; j += 8) {
      uint4 scale[2], offset[2], out[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4* from = reinterpret_cast<const uint4*>(params + 32 * word + 16 * h + j);
        scale[h] = from[0], offset[h] = from[kDim / 8];
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const __half2 a = code_pair<kBits>(pairs, j + 2 * e),
                      b = code_pair<kBits>(pairs, j + 2 * e + 1);
        (&out[0].x)[e] =
            level_pair<kBfloat>(__lows2half2(a, b), (&scale[0].x)[e], (&offset[0].x)[e]);
        (&out[1].x)[e] =
            level_pair<kBfloat>(__highs2half2(a, b), (&scale[1].x)[e], (&offset[1].x)[e]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<uint4*>(to + place<kDim>(token, 4 * word + 2 * h + j / 8)) = out[h];
    }
  }
}

// Values of 64 tokens, kValues of their channels: `words` of the first plane and channel and of the
// tile's first 32 tokens.
// They are fp16 numbers in BF16 models too: all tokens of a group share the error of a rounded
// level, so it does not average out as the values do.
template <int kBits, int kDim, int kValues>
__device__ __forceinline__ void unpack_values(char* to, const int* words, const __half* params) {
#pragma unroll 1
  for (unsigned q = threadIdx.x; q < kValues; q += kPrefillThreads) {
    const unsigned c = q % (kValues / 2) * 2,
                   half = q / (kValues / 2);  // channels c and c + 1, 32 tokens
    Pairs<kBits> pairs[2];
    uint32_t planes[2][kBits];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int p = 0; p < kBits; ++p) planes[i][p] = __ldg(words + (p * kDim + c + i) * 4 + half);
    const __half2 offset = *reinterpret_cast<const __half2*>(params + kDim + c);
    __half2 scale = *reinterpret_cast<const __half2*>(params + c);
    constexpr float kTop = (1 << kBits) - 1;
    scale = __halves2half2(finite_scale(scale.x, offset.x, kTop),
                           finite_scale(scale.y, offset.y, kTop));
#pragma unroll
    for (int i = 0; i < 2; ++i) pairs[i].set(planes[i]);
    char* at[8];  // of the channels in rows that are turned by this much
#pragma unroll
    for (int turn = 0; turn < (kValues % 64 ? 4 : 8); ++turn)
      at[turn] = to + (32 * half * (kValues / 8) + (c / 8 ^ turn)) * 16 + c % 8 * 2;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const __half2 a = code_pair<kBits>(pairs[0], j), b = code_pair<kBits>(pairs[1], j);
      char* row = at[kValues % 64 ? j >> 1 & 3 : j & 7] + j * kValues * 2;
      const uint32_t s = reinterpret_cast<const uint32_t&>(scale),
                     o = reinterpret_cast<const uint32_t&>(offset);
      *reinterpret_cast<uint32_t*>(row) = level_pair<false>(__lows2half2(a, b), s, o);
      *reinterpret_cast<uint32_t*>(row + 16 * kValues * 2) =
          level_pair<false>(__highs2half2(a, b), s, o);
    }
  }
}

// call(number of bits as a compile-time constant)
template <class Call>
__device__ __forceinline__ void with_bits(int bits, Call call) {
  switch (bits) {
    case 2:
      return call(std::integral_constant<int, 2>());
    case 4:
      return call(std::integral_constant<int, 4>());
    case 8:
      return call(std::integral_constant<int, 8>());
    default:
      return call(std::integral_constant<int, 1>());
  }
}

}  // namespace vkvx
