// Decode attention on codes of 1 to 8 bits with the INT8 tensor cores, five to eight query vectors
// per KV head.
//
// As decode_codes.cuh, but the query vectors are the 16 rows of a product, the low bytes of vector
// g row g and the high ones row g + 8, and codes its columns: a lane has both bytes of one vector,
// g in lanes 4g + t. Column 2t + e of column tile i of the scores is token 32t + 2i + e, so that
// lane 4g + t has those of word t of the values, whose weights are the rows of the second product
// as they are.
#pragma once

#include "code_bytes.cuh"

namespace vkvx {

// kBits 0: any bits of keys and values, any head dim up to 128, both read from the parameters.
// kMask: with windows, masks and bounds of scores.
template <int kBits, bool kMask = false>
struct Codes8Engine : CodeShape<kBits, 128> {
  using Shape = CodeShape<kBits, 128>;
  using Shape::bits_of_keys, Shape::bits_of_values, Shape::head_dim, Shape::lane;
  using Shape::kAbove, Shape::kAny, Shape::kBelow, Shape::kMagic, Shape::kMagicBits;
  using Shape::kPaddedDim, Shape::kSegmentTiles, Shape::kWeight;
  static constexpr bool kMasked = kMask;
  static constexpr int kColumns = 8;
  // Warps of a block, and blocks of a multiprocessor, which bound the registers.
  static constexpr bool kSmall = kBits == 1 || kBits == 2;
  static constexpr int kWarps = kSmall ? 6 : 4, kBlocks = kSmall ? 2 : 3, kMostWarps = 12;
  static constexpr float kPeak = 32600.0f;
  // At 1 bit sums of scores start at this integer, whose bits are those of the float `kMagic`, and
  // are floats when done.
  static constexpr bool kStartsAtMagic = kBits == 1;

  // Low and high bytes of the query, then of the weights.
  uint32_t query[8], upper_query[8], weight[8], upper_weight[8];
  float step, bias, most;  // of query vector g
  float score[32];         // of tokens 32t + i
  int sum[kPaddedDim / 8][4], total[4];
  float low, high;
  int tiles;       // of the segment
  int first_seen;  // kMasked: the first cached entry that query vector g sees
  float bound;     // kMasked: of the scores, in units of log2; 0: none

  __device__ __forceinline__ explicit Codes8Engine(const VkvxParams& p)
      : Shape(p), low(INFINITY), high(-INFINITY), tiles(0), bound(p.softcap * kLog2e) {}

  __device__ __forceinline__ static int column() { return lane() >> 2; }
  __device__ __forceinline__ static bool writes_column() { return (lane() & 3) == 0; }

  // Fold the key parameters of a group (shared memory: scale, offset, rms) into the queries (shared
  // memory, times scale * log2 e).
  __device__ __forceinline__ void start_group(const __half* params, const float* queries,
                                              int stride, int correction, float limit,
                                              const float2* affine) {
    const int D = head_dim(), bits = bits_of_keys(), t = lane() & 3;
    float u[32], largest = 0.0f, side = 0.0f, spread = 0.0f, all = 0.0f;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float4 q4 = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      __half scale[4] = {}, offset[4] = {}, error[4] = {};
      if (!kAny || t < D / 32) {
        const int c = 32 * t + 4 * n;
        q4 = *reinterpret_cast<const float4*>(queries + column() * stride + c + 4 * t);
        *reinterpret_cast<uint2*>(scale) = *reinterpret_cast<const uint2*>(params + c);
        *reinterpret_cast<uint2*>(offset) = *reinterpret_cast<const uint2*>(params + D + c);
        *reinterpret_cast<uint2*>(error) = *reinterpret_cast<const uint2*>(params + 2 * D + c);
      }
      const float q[4] = {q4.x, q4.y, q4.z, q4.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = q[i] * __half2float(scale[i]), y = q[i] * __half2float(error[i]);
        u[4 * n + i] = x;
        largest = fmaxf(largest, fabsf(x));
        side = fmaf(q[i], __half2float(offset[i]), side);
        spread = fmaf(y, y, spread);
        all += x;
      }
    }
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) largest = fmaxf(largest, __shfl_xor_sync(kFull, largest, o));
    largest = fmaxf(largest, 1e-30f);
    const float inverse = largest * (1.0f / kPeak), factor = __fdividef(kPeak, largest);
    // Rounded to the integers in the low bits of floats; 128 more makes the upper byte right for a
    // signed lower one.
    uint32_t rounded = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int e = byte_shift(j, bits);
      const float down = factor * __int_as_float((127 - e) << 23);
      uint32_t x[4], y[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        x[m] = __float_as_uint(fmaf(u[8 * m + j], down, kMagic));
        y[m] = __float_as_uint(fmaf(u[8 * m + j], down, kMagic + 128.0f));
      }
      rounded += (x[0] + x[1] + x[2] + x[3] - 4u * kMagicBits) << e;
      query[j] =
          __byte_perm(__byte_perm(x[0], x[1], 0x0040), __byte_perm(x[2], x[3], 0x0040), 0x5410);
      upper_query[j] =
          __byte_perm(__byte_perm(y[0], y[1], 0x0051), __byte_perm(y[2], y[3], 0x0051), 0x5410);
    }
    // What rounding took from the query is made up for at the middle code.
    const float middle = 0.5f * ((1 << bits) - 1);
    side = fmaf(fmaf(-static_cast<float>(static_cast<int>(rounded)), inverse, all), middle, side);
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) {
      side += __shfl_xor_sync(kFull, side, o);
      spread += __shfl_xor_sync(kFull, spread, o);
    }
    step = inverse;
    bias = side;
    if (correction == VKVX_CORRECTION_EXPECTED)
      bias += kLog2e * expected_correction(0.5f / (kLog2e * kLog2e) * spread, limit);
    if (affine != nullptr) {
      const float2 a = affine[column()];
      step *= a.x;
      bias = fmaf(bias, a.x, a.y);
    }
    if constexpr (kStartsAtMagic) bias = fmaf(-kMagic, step, bias);
  }

  __device__ __forceinline__ void start_segment() {
    tiles = 0;
    most = -1e30f;
#pragma unroll
    for (int i = 0; i < kPaddedDim / 8; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0;
    total[0] = total[1] = total[2] = total[3] = 0;
  }

  __device__ __forceinline__ void scores(uint32_t keys) {
    Shape::with_bits(this->key_bits,
                     [&](auto bits) { multiply_keys<decltype(bits)::value>(keys); });
  }

  template <int kKeyBits>
  __device__ __forceinline__ void multiply_keys(uint32_t keys) {
    const int D = head_dim(), g = lane() >> 2, t = lane() & 3;
    constexpr int kStart = kStartsAtMagic ? kMagicBits : 0;
    int start[4] = {kStart, kStart, 0, 0};
    // Or the compiler makes them anew for each product.
    asm volatile("" : "+r"(start[0]), "+r"(start[1]), "+r"(start[2]), "+r"(start[3]));
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {  // four column tiles
      uint32_t words[kKeyBits][4];
#pragma unroll
      for (int p = 0; p < kKeyBits; ++p) {
        const uint32_t plane = keys + p * D * 16;
        if (!kAny || D == kPaddedDim) {
          const int r = lane() & 7,
                    token = 16 * (r & 6) + (r & 1) + 8 * quarter + 2 * (lane() >> 3);
          load_matrices(words[p], plane + (token ^ ((r & 6) + (quarter >> 1))) * 16);
        } else {
          const int word = min(t, D / 32 - 1);  // one that does not exist is multiplied by 0
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const int token = 16 * (g & 6) + (g & 1) + 8 * quarter + 2 * m;
            words[p][m] =
                load_word(plane + ((token * (D / 8) + 4 * word) ^ ((g & 6) + (quarter >> 1)) << 4));
          }
        }
      }
      CodeBytes<kKeyBits> columns[4];
      set_rows(columns, words);
      int c[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int (&before)[4] = *(j == 0 ? &start : &c[m]);
          mma_bytes<true, false>(c[m], query[j], upper_query[j], query[j + 4], upper_query[j + 4],
                                 columns[m][j], columns[m][j + 4], before);
        }
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int joined = c[m][e] + c[m][2 + e] * 256;
          score[8 * quarter + 2 * m + e] =
              kStartsAtMagic ? __int_as_float(joined) : static_cast<float>(joined);
        }
    }
  }

  // Largest score of the first n tokens, in the same unit as `score`, over the lanes of the vector.
  __device__ __forceinline__ float largest_score(int n, float sign) const {
    float top = -INFINITY;
    if (uniform(n == kTile)) {
#pragma unroll
      for (int i = 0; i < 32; ++i) top = fmaxf(top, sign * score[i]);
    } else {
      const int left = n - 32 * (lane() & 3);
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (i < left) top = fmaxf(top, sign * score[i]);
    }
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) top = fmaxf(top, __shfl_xor_sync(kFull, top, o));
    return top;
  }

  // Take the scores of the first n tokens into `low` and `high`.
  __device__ __forceinline__ void extremes(int n) {
    high = fmaxf(high, fmaf(largest_score(n, 1.0f), step, bias));
    low = fminf(low, fmaf(-largest_score(n, -1.0f), step, bias));
  }

  // Products to scores in units of log2: bounded ones of the first n tokens that are seen, -inf of
  // others. The tile's first token is cached entry `entry`.
  __device__ __forceinline__ void mask_scores(int n, int entry) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int token = 32 * (lane() & 3) + i;
      float& x = score[i];
      x = fmaf(x, step, bias);
      if (bound > 0.0f) x = bounded_score(x, bound);
      if (token >= n || entry + token < first_seen) x = -INFINITY;
    }
  }

  // Turn the scores of the first n tokens into weights; `flush` ends a segment that they do not fit
  // into. The tile's first token is cached entry `entry`.
  template <class Flush>
  __device__ __forceinline__ void softmax(int n, int entry, const Flush& flush) {
    if constexpr (kMasked) {
      mask_scores(n, entry);
      n = kTile;
    }
    const float to_score = kMasked ? 1.0f : step, offset = kMasked ? 0.0f : bias;
    float top = fmaf(largest_score(n, 1.0f), to_score, offset);
    if constexpr (kMasked) top = fmaxf(top, -1e30f);
    if (uniform(tiles == kSegmentTiles || top > most + kAbove || top < most - kBelow)) {
      if (tiles > 0) {
        flush();
        start_segment();
      }
      most = top;
    }
    ++tiles;
    const float shift = offset - most + kWeight;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float e = static_cast<float>(byte_shift(j, bits_of_values()));
      uint32_t x[4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        x[m] = __float_as_uint(exp2_fast(fmaf(score[8 * m + j], to_score, shift - e)) + 8388608.0f);
      const uint32_t a = __byte_perm(x[0], x[1], 0x5140), b = __byte_perm(x[2], x[3], 0x5140);
      weight[j] = __byte_perm(a, b, 0x5410);
      upper_weight[j] = __byte_perm(a, b, 0x7632);
    }
    if (uniform(n < kTile)) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int left = n - 32 * (lane() & 3) - j;  // bytes m with 8m < left are tokens
        const uint32_t mask = left <= 0 ? 0u : left > 24 ? kFull : (1u << (left + 7 & ~7)) - 1;
        weight[j] &= mask;
        upper_weight[j] &= mask;
      }
    }
  }

  __device__ __forceinline__ void values(uint32_t values) {
    Shape::with_bits(this->value_bits,
                     [&](auto bits) { multiply_values<decltype(bits)::value>(values); });
  }

  template <int kValueBits>
  __device__ __forceinline__ void multiply_values(uint32_t values) {
    const int D = head_dim();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      mma_bytes<false, false>(total, weight[j], upper_weight[j], weight[j + 4], upper_weight[j + 4],
                              0x01010101u << byte_shift(j, kValueBits),
                              0x01010101u << byte_shift(j + 4, kValueBits), total);
    // Column 2t + e of column tile i is channel D / 4 * t + 2i + e: a lane gets D / 4 adjacent
    // ones.
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      if (kAny && 32 * quarter >= D) continue;
      CodeBytes<kValueBits> columns[4];
      {
        uint32_t words[kValueBits][4];
        const int r = lane() & 7, within = (r & 1) + 8 * quarter + 2 * (lane() >> 3),
                  channel = D / 4 * (r >> 1) + within;
        const int swizzle = (r & 6) + (within >= D / 8);
#pragma unroll
        for (int p = 0; p < kValueBits; ++p)
          load_matrices(words[p], values + (p * D + (channel ^ swizzle)) * 16);
        set_rows(columns, words);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          int (&to)[4] = sum[4 * quarter + m];
          mma_bytes<false, false>(to, weight[j], upper_weight[j], weight[j + 4],
                                  upper_weight[j + 4], columns[m][j], columns[m][j + 4], to);
        }
    }
  }

  // Add the segment to the warp's result, with the group's value parameters (shared memory: scale,
  // offset).
  template <class Result>
  __device__ __forceinline__ void end_segment(Result& result, const __half* params) {
    const int D = head_dim();
    auto both = [](int low, int high) {
      return fmaf(static_cast<float>(high), 256.0f, static_cast<float>(low));
    };
    const float all = both(total[0], total[2]);
    result.begin_column(column(), most - kWeight, all, writes_column());
#pragma unroll
    for (int pair = 0; pair < kPaddedDim / 16; ++pair) {
      if (kAny && 16 * pair >= D) continue;
      const int c = D / 4 * (lane() & 3) + 4 * pair;
      __half scale[4], offset[4];
      *reinterpret_cast<uint2*>(scale) = *reinterpret_cast<const uint2*>(params + c);
      *reinterpret_cast<uint2*>(offset) = *reinterpret_cast<const uint2*>(params + D + c);
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int (&bytes)[4] = sum[2 * pair + (i >> 1)];
        x[i] = fmaf(__half2float(scale[i]), both(bytes[i & 1], bytes[2 + (i & 1)]),
                    __half2float(offset[i]) * all);
      }
      result.add_four(column(), c, x);
    }
    result.end();
  }
};

}  // namespace vkvx
