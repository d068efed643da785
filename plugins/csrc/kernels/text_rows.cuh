// Text rows of 8 bits (docs/format.md): D/4 words of four codes, then one with the scale.
#pragma once

#include "common.cuh"

namespace vkvx {

constexpr int kTextTop = 127;             // the largest code
constexpr float kMostTextScale = 515.5f;  // times that code it rounds to an FP16 number

__host__ __device__ __forceinline__ int text_words(int dim) { return dim / 4 + 1; }

// The first word of a row of the cache, whose scale is in the last.
__device__ __forceinline__ int* text_row(void* rows, int64_t row, int dim) {
  return static_cast<int*>(rows) + row * text_words(dim);
}

// Four codes of a word, times the scale, as two pairs of the model's type.
template <bool kBfloat>
__device__ __forceinline__ uint2 dequantize_word(uint32_t word, __half scale) {
  const uint32_t biased = word ^ 0x80808080u;  // codes + 128
  if constexpr (kBfloat) {
    constexpr uint32_t kMagic = 0x4b000000u;  // 2^23: the lowest byte counts ones
    constexpr float kBias = 8388736.0f;       // 2^23 + 128
    const float s = __half2float(scale);
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = (__uint_as_float(__byte_perm(biased, kMagic, 0x7650 | i)) - kBias) * s;
    return make_uint2(pack_bfloat2(x[0], x[1]), pack_bfloat2(x[2], x[3]));
  } else {
    constexpr uint32_t kMagic = 0x64646464u;  // 1024 in the upper byte: the lower one counts ones
    const __half2 bias = __float2half2_rn(1152.0f), s = __half2half2(scale);
    uint32_t pairs[2] = {__byte_perm(biased, kMagic, 0x4140), __byte_perm(biased, kMagic, 0x4342)};
#pragma unroll
    for (uint32_t& pair : pairs) {
      const __half2 x = __hmul2(__hsub2(reinterpret_cast<__half2&>(pair), bias), s);
      pair = reinterpret_cast<const uint32_t&>(x);
    }
    return make_uint2(pairs[0], pairs[1]);
  }
}

// Eight codes as 16 bytes of shared memory.
template <bool kBfloat>
__device__ __forceinline__ void store_eight(uint32_t to, uint2 words, __half scale) {
  const uint2 low = dequantize_word<kBfloat>(words.x, scale),
              high = dequantize_word<kBfloat>(words.y, scale);
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(low.x), "r"(low.y),
               "r"(high.x), "r"(high.y)
               : "memory");
}

__device__ __forceinline__ __half scale_of(int word) {
  return __ushort_as_half(static_cast<unsigned short>(word));
}

// A product of code and scale as a number of the model's type; it is within the range of FP16.
__device__ __forceinline__ float rounded_to(float x, int dtype) {
  return dtype == VKVX_FLOAT16    ? __half2float(__float2half_rn(x))
         : dtype == VKVX_BFLOAT16 ? __bfloat162float(__float2bfloat16_rn(x))
                                  : x;
}

// Channel c of a row: a number of the model's type.
__device__ __forceinline__ float load_code(const void* rows, int64_t row, int dim, int c,
                                           int dtype) {
  const int* words = static_cast<const int*>(rows) + row * text_words(dim);
  const int code = reinterpret_cast<const signed char*>(words)[c];
  return rounded_to(static_cast<float>(code) * __half2float(scale_of(words[dim / 4])), dtype);
}

// Quantises and stores the `dim` numbers from element `at` of an array of the model's type as a
// row; a warp works together.
__device__ __forceinline__ void store_text_row(int* row, const void* data, int64_t at, int dim,
                                               int dtype) {
  constexpr int kMostWords = VKVX_MAX_HEAD_DIM / 4 / 32;  // of a lane
  const int lane = threadIdx.x & 31;
  float x[kMostWords][4], most = 0.0f;
#pragma unroll
  for (int i = 0; i < kMostWords; ++i) {
    if (32 * i >= dim / 4) break;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = 4 * (32 * i + lane) + j;
      const float y = c < dim ? load_float(data, at + c, dtype) : 0.0f;
      x[i][j] = y == y ? within_half(y) : 0.0f;
      most = fmaxf(most, fabsf(x[i][j]));
    }
  }
  const __half rounded = __float2half_rn(__fdiv_rn(warp_max(most), kTextTop));
  const float scale = fminf(__half2float(rounded), kMostTextScale);
#pragma unroll
  for (int i = 0; i < kMostWords; ++i) {
    if (32 * i >= dim / 4) break;
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int code = scale > 0.0f ? __float2int_rn(__fdiv_rn(x[i][j], scale)) : 0;
      word |= (static_cast<uint32_t>(max(-kTextTop, min(kTextTop, code))) & 0xffu) << 8 * j;
    }
    if (32 * i + lane < dim / 4) row[32 * i + lane] = static_cast<int>(word);
  }
  if (lane == 0) row[dim / 4] = __half_as_ushort(__float2half_rn(scale));
}

// Stores the key or the value of the call's token at `position` as row `row` of the cache; a warp
// works together. A function of its own, so that it takes no registers from what calls it.
static __device__ __noinline__ void append_code_row(const VkvxParams& p, bool is_key, int b,
                                                    int head, int position, int64_t row) {
  const int64_t (&stride)[3] = is_key ? p.key_stride : p.value_stride;
  store_text_row(text_row(is_key ? p.text_key : p.text_value, row, p.head_dim),
                 is_key ? p.key : p.value, b * stride[0] + head * stride[1] + position * stride[2],
                 p.head_dim, p.dtype);
}

}  // namespace vkvx
