// Decode attention on 1-, 2- and 4-bit codes with the binary tensor cores: few query vectors per KV
// head, so that unpacking would dominate.
//
// The query, scaled and rounded to 16 binary places, is split into bit planes; popc(key word &
// query plane), summed by the tensor core over 128 channels, is a count in 0..128 for each token
// and plane. A second product, of bytes, weighs the counts by powers of four: a count fills a
// register of that product's operand as it is, and weights that differ from zero in two columns
// alone for each of four row tiles collect the scores of 64 tokens in four registers per lane.
// Values likewise, with the weights of the tokens rounded to 16 bits and turned to planes. Native
// on compute capability 8.0 to 9.0; emulated later, where decode_codes.cuh is the better choice.
#pragma once

#include "common.cuh"

namespace vkvx {

// In each byte: bit b of lane 4g + t to bit g of lane 4b + t.
__device__ __forceinline__ uint32_t transpose_bits(uint32_t x) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const int shift = 1 << k;
    const uint32_t low = k == 0 ? 0x55555555u : k == 1 ? 0x33333333u : 0x0f0f0f0fu;
    const bool upper = lane & (4 << k);
    const uint32_t y = __shfl_xor_sync(kFull, x, 4 << k);
    const uint32_t moved = __funnelshift_l(y, y, upper ? 32 - shift : shift);
    const uint32_t keep = upper ? ~low : low;
    x = (x & keep) | (moved & ~keep);
  }
  return x;
}

template <int kBits, int kQueries>
struct PlanesEngine {
  static constexpr int kColumns = kQueries;
  static constexpr int kPlanes = kBits, kPaddedDim = 128;
  // Warps of a block, and blocks of a multiprocessor, which bound the registers.
  static constexpr int kWarps = 4, kBlocks = kQueries == 1 ? 4 : 3, kMostWarps = kWarps * kBlocks;
  static constexpr bool kAny = false, kSnaps = false, kMasked = false;

  // Queries are written in base -2, so that odd planes alone are negative; 16 places hold integers
  // of -43690 to 21845.
  static constexpr float kPeak = 21844.0f;
  static constexpr uint32_t kNegabinary = 0xaaaau;

  uint32_t query[kQueries][2];
  float step[kQueries], bias[kQueries];
  int score[kQueries][4];
  uint32_t weight[kQueries][2];
  float sum[kQueries][4], total[kQueries], most[kQueries], fade[kQueries], gain[kQueries];

  __device__ __forceinline__ explicit PlanesEngine(const VkvxParams&) {}

  __device__ __forceinline__ static int lane() { return threadIdx.x & 31; }
  // Token or channel of number j of the lane's four.
  __device__ __forceinline__ static int place(int j) {
    return 32 * (lane() & 3) + (lane() >> 2) + 8 * j;
  }

  __device__ __forceinline__ void start_group(const __half* params, const float* queries,
                                              int stride, int correction, float limit,
                                              const float2*) {
    const int t = lane() & 3;
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
      float u[4], largest = 0.0f, b = 0.0f, spread = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = place(j);
        const float q = queries[n * stride + c + 4 * t];
        u[j] = q * __half2float(params[c]);
        largest = fmaxf(largest, fabsf(u[j]));
        b = fmaf(q, __half2float(params[128 + c]), b);
        const float error = q * __half2float(params[256 + c]);
        spread = fmaf(error, error, spread);
      }
      largest = __int_as_float(reduce_max(
          __float_as_int(largest)));  // not negative, so the order is that of the integers
      largest = fmaxf(largest, 1e-30f);
      const float inverse = largest * (1.0f / kPeak), factor = __fdividef(kPeak, largest);
      float rounding = 0.0f;
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int r = __float2int_rn(u[j] * factor);
        rounding += fmaf(-static_cast<float>(r), inverse, u[j]);
        x[j] = static_cast<uint32_t>(r) + kNegabinary ^ kNegabinary;
      }
      constexpr float kMiddle = 0.5f * ((1 << kBits) - 1);
      b = warp_sum(fmaf(rounding, kMiddle, b));
      if (correction == VKVX_CORRECTION_EXPECTED)
        b += kLog2e * expected_correction(0.5f / (kLog2e * kLog2e) * warp_sum(spread), limit);
      bias[n] = b;
      step[n] = inverse;
      to_planes(x, query[n]);
    }
  }

  // 16-bit integers of the lane's four tokens or channels to planes 0-7 and 8-15 of their words.
  __device__ __forceinline__ static void to_planes(const uint32_t (&x)[4], uint32_t (&planes)[2]) {
    const uint32_t a = __byte_perm(x[0], x[1], 0x5140),
                   b = __byte_perm(x[2], x[3], 0x5140);  // low, low, high, high
    planes[0] = transpose_bits(__byte_perm(a, b, 0x5410));
    planes[1] = transpose_bits(__byte_perm(a, b, 0x7632));
  }

  __device__ __forceinline__ void start_segment() {
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
      sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = total[n] = 0.0f;
      most[n] = -1e30f;
    }
  }

  // product[n][number j of the lane's four rows] for all n: words of the rows of one plane times
  // the planes of x, whose odd ones weigh negatively if kNegative. A lane of the counts has planes
  // 2t and 2t + 1 of rows g and g + 8; taken as an operand as they are, these are rows g and g + 8,
  // and the two rows the upper and lower half of the depth, told apart by the columns.
  template <bool kNegative>
  __device__ __forceinline__ void multiply(uint32_t planes, const uint32_t (&x)[kQueries][2],
                                           int (&product)[kQueries][4]) {
    const int g = lane() >> 2, t = lane() & 3;
    constexpr int kSums = (kBits + 1) / 2;  // two planes' weights fit a byte
    int low[kSums][kQueries][2][4], high[kSums][kQueries][2][4];
#pragma unroll
    for (int p = 0; p < kSums; ++p)
#pragma unroll
      for (int n = 0; n < kQueries; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int j = 0; j < 4; ++j) low[p][n][half][j] = high[p][n][half][j] = 0;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t b0 = g == 2 * pair ? 1u << (2 * t) : 0u,
                     b1 = g == 2 * pair + 1 ? 1u << (2 * t) : 0u;
#pragma unroll
      for (int p = 0; p < kBits; ++p) {
        uint32_t words[4];
        const int row = 32 * pair + lane();
        load_matrices(words, planes + (p * 128 + (row ^ (row >> 4 & 7))) * 16);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int n = 0; n < kQueries; ++n) {
            int c[4], d[4];
            mma_bits(c, words[2 * half], words[2 * half + 1], x[n][0]);
            mma_bits(d, words[2 * half], words[2 * half + 1], x[n][1]);
            mma_bytes<false, false>(low[p / 2][n][half], c[0], c[1], c[2], c[3], b0 << p % 2,
                                    b1 << p % 2);
            mma_bytes<false, false>(high[p / 2][n][half], d[0], d[1], d[2], d[3], b0 << p % 2,
                                    b1 << p % 2);
          }
      }
    }
    constexpr int kOdd = kNegative ? -2 : 2;
#pragma unroll
    for (int n = 0; n < kQueries; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        product[n][j] = 0;
#pragma unroll
        for (int p = 0; p < kSums; ++p) {
          const auto &l = low[p][n][j >> 1], &h = high[p][n][j >> 1];
          product[n][j] +=
              (l[j & 1] + h[j & 1] * 256 + (l[2 + (j & 1)] + h[2 + (j & 1)] * 256) * kOdd) << 2 * p;
        }
      }
  }

  __device__ __forceinline__ void scores(uint32_t keys) { multiply<true>(keys, query, score); }

  template <class Flush>
  __device__ __forceinline__ void softmax(int count, int, const Flush&) {
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
      int top = INT32_MIN;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (place(j) < count) top = max(top, score[n][j]);
      top = reduce_max(top);
      const float here = fmaf(static_cast<float>(top), step[n], bias[n]),
                  now = fmaxf(most[n], here);
      fade[n] = exp2_fast(most[n] - now);
      gain[n] = exp2_fast(here - now);
      most[n] = now;
      uint32_t x[4];
      float l = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float w =
            place(j) < count ? exp2_fast(static_cast<float>(score[n][j] - top) * step[n]) : 0.0f;
        const float shifted = fmaf(w, 65535.0f, 8388608.0f);  // the integer is in the low bits
        l += shifted - 8388608.0f;
        x[j] = __float_as_uint(shifted);
      }
      total[n] = fmaf(total[n], fade[n], l * gain[n]);
      to_planes(x, weight[n]);
    }
  }

  __device__ __forceinline__ void values(uint32_t values) {
    int product[kQueries][4];
    multiply<false>(values, weight, product);
#pragma unroll
    for (int n = 0; n < kQueries; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sum[n][j] = fmaf(static_cast<float>(product[n][j]), gain[n], sum[n][j] * fade[n]);
  }

  template <class Result>
  __device__ __forceinline__ void end_segment(Result& result, const __half* params) {
    constexpr float kUnit = 1.0f / 65535.0f;
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
      const float all = warp_sum(total[n]) * kUnit;
      result.begin_column(n, most[n], all, lane() == 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = place(j);
        result.add_to_column(
            n, c,
            fmaf(__half2float(params[c]), sum[n][j] * kUnit, __half2float(params[128 + c]) * all));
      }
    }
    result.end();
  }
};

}  // namespace vkvx
