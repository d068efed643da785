// Decode attention on codes of 1 to 8 bits with the INT8 tensor cores, up to four query vectors per
// KV head.
//
// Queries and weights are integers of 16 bits. Their low and high bytes are separate columns of one
// product, whose rows are codes (code_bytes.cuh): columns 2h and 2h + 1 are the bytes of query
// vector h, and a lane of the result has both bytes of one vector. Integer sums are exact, so a
// segment's values are summed in integers, whose weights are relative to one score, `most`; when a
// tile's largest score is far from it, the segment ends.
//
// Lane 4g + t takes word t of its rows: register j of the word has its bits j, j + 8, j + 16 and j
// + 24. Row g of row tile i of the scores is token 16g + i, row g + 8 token 16g + 8 + i;
// transposing the bytes of their weights (movmatrix) gives lane 4g + t those of tokens 32t + i +
// {0, 8, 16, 24}, which is register i of word t of the values.
#pragma once

#include "code_bytes.cuh"

namespace vkvx {

// kBits 0: any bits of keys and values, any head dim up to 128 * kWords, both read from the
// parameters. kMask: with windows, masks and bounds of scores.
template <int kBits, int kWords, bool kMask = false>
struct CodesEngine : CodeShape<kBits, 128 * kWords> {
  using Shape = CodeShape<kBits, 128 * kWords>;
  using Shape::bits_of_keys, Shape::bits_of_values, Shape::head_dim, Shape::lane;
  using Shape::kAbove, Shape::kAny, Shape::kBelow, Shape::kMagic, Shape::kMagicBits;
  using Shape::kPaddedDim, Shape::kSegmentTiles, Shape::kWeight;
  static constexpr bool kMasked = kMask;
  static constexpr int kColumns = 4;
  // Warps of a block, and blocks of a multiprocessor, which bound the registers.
  static constexpr int kWarps = 4, kBlocks = kWords > 2 ? 1 : kWords == 2 ? 2 : kMasked ? 3 : 4;
  static constexpr int kMostWarps = kWarps * kBlocks;
  // At 1 bit sums of scores start at this integer, whose bits are those of the float `kMagic`, and
  // are floats when done.
  static constexpr bool kStartsAtMagic = kBits == 1 && kWords == 1;
  // Sums of the widest heads would leave 32 bits, or the query lose two bits.
  static constexpr bool kJoinsAsFloats = kWords > 2;

  uint32_t query[kWords][8];
  float step, bias, most;  // of query vector t
  float score[8][2];
  uint32_t weight[8];
  int sum[kPaddedDim / 16][4], total[4];
  float low, high;
  int tiles;       // of the segment
  int first_seen;  // kMasked: the first cached entry that query vector t sees
  float bound;     // kMasked: of the scores, in units of log2; 0: none

  __device__ __forceinline__ explicit CodesEngine(const VkvxParams& p)
      : Shape(p), low(INFINITY), high(-INFINITY), tiles(0), bound(p.softcap * kLog2e) {}

  // The query vector whose scores the lane has, and whether it is one of the lanes that tell.
  __device__ __forceinline__ static int column() { return lane() & 3; }
  __device__ __forceinline__ static bool writes_column() { return lane() < 4; }

  // Fold the key parameters of a group (shared memory: scale, offset, rms) into the queries (shared
  // memory, times scale * log2 e).
  __device__ __forceinline__ void start_group(const __half* params, const float* queries,
                                              int stride, int correction, float limit,
                                              const float2* affine) {
    const int D = head_dim(), bits = bits_of_keys(), g = lane() >> 2, t = lane() & 3, odd = g & 1;
    constexpr float kPeak = kJoinsAsFloats ? 32600.0f : 32600.0f / kWords;
    // Even lanes multiply by the offsets, odd ones by the errors; both need the scales.
    const __half* extra = params + (1 + odd) * D;
    float u[kWords][32], largest = 0.0f, side = 0.0f, all = 0.0f;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int word = t + 4 * w;
      const bool exists = !kAny || word < D / 32;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float4 q4 = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        __half scale[4] = {}, more[4] = {};
        if (exists) {
          const int c = 32 * word + 4 * n;
          q4 = *reinterpret_cast<const float4*>(queries + (g >> 1) * stride + c + 4 * word);
          *reinterpret_cast<uint2*>(scale) = *reinterpret_cast<const uint2*>(params + c);
          *reinterpret_cast<uint2*>(more) = *reinterpret_cast<const uint2*>(extra + c);
        }
        const float q[4] = {q4.x, q4.y, q4.z, q4.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = q[i] * __half2float(scale[i]), y = q[i] * __half2float(more[i]);
          u[w][4 * n + i] = x;
          largest = fmaxf(largest, fabsf(x));
          side = fmaf(y, odd ? y : 1.0f, side);
          all += x;
        }
      }
    }
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) largest = fmaxf(largest, __shfl_xor_sync(kFull, largest, o));
    largest = fmaxf(largest, 1e-30f);
    const float inverse = largest * (1.0f / kPeak), factor = __fdividef(kPeak, largest);
    // Rounded to the integers in the low bits of floats; 128 more makes the upper byte right for
    // a signed lower one.
    const float magic = odd ? kMagic + 128.0f : kMagic;
    const uint32_t select = odd ? 0x0051u : 0x0040u;
    uint32_t rounded = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int e = byte_shift(j, bits);
        const float down = factor * __int_as_float((127 - e) << 23);
        uint32_t x[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) x[m] = __float_as_uint(fmaf(u[w][8 * m + j], down, magic));
        rounded += (x[0] + x[1] + x[2] + x[3] - 4u * kMagicBits - 512u * odd) << e;
        query[w][j] =
            __byte_perm(__byte_perm(x[0], x[1], select), __byte_perm(x[2], x[3], select), 0x5410);
      }
    // What rounding took from the query is made up for at the middle code.
    const float middle = 0.5f * ((1 << bits) - 1);
    if (!odd)
      side = fmaf(fmaf(-static_cast<float>(static_cast<int>(rounded)), inverse, all), middle, side);
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) side += __shfl_xor_sync(kFull, side, o);
    const float spread = __shfl_xor_sync(kFull, side, 4);
    float b = side, s = inverse;
    if (correction == VKVX_CORRECTION_EXPECTED)
      b += kLog2e * expected_correction(0.5f / (kLog2e * kLog2e) * spread, limit);
    if (affine != nullptr) {
      const float2 a = affine[g >> 1];
      s *= a.x;
      b = fmaf(b, a.x, a.y);
    }
    if constexpr (kStartsAtMagic) b = fmaf(-kMagic, s, b);
    step = __shfl_sync(kFull, s, 8 * t);
    bias = __shfl_sync(kFull, b, 8 * t);
  }

  __device__ __forceinline__ void start_segment() {
    tiles = 0;
    most = -1e30f;
#pragma unroll
    for (int i = 0; i < kPaddedDim / 16; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0;
    total[0] = total[1] = total[2] = total[3] = 0;
  }

  __device__ __forceinline__ void scores(uint32_t keys) {
    Shape::with_bits(this->key_bits,
                     [&](auto bits) { multiply_keys<decltype(bits)::value>(keys); });
  }

  template <int kKeyBits>
  __device__ __forceinline__ void multiply_keys(uint32_t keys) {
    const int D = head_dim(), g = lane() >> 2, t = lane() & 3;
#pragma unroll
    for (int pair = 0; pair < 4;
         ++pair) {  // two row tiles: words of rows g and g + 8 of the one, then of the other
      uint32_t words[kWords][kKeyBits][4];
#pragma unroll
      for (int p = 0; p < kKeyBits; ++p)
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const uint32_t plane = keys + p * D * 16;
          if (!kAny || D == kPaddedDim) {
            const int r = lane() & 7,
                      token = 16 * r + 8 * ((lane() >> 3) & 1) + 2 * pair + (lane() >> 4);
            load_matrices(words[w][p], plane + ((token * kWords + w) ^ r) * 16);
          } else {
            const int word =
                min(t + 4 * w, D / 32 - 1);  // one that does not exist is multiplied by 0
#pragma unroll
            for (int m = 0; m < 4; ++m) {
              const int token = 16 * g + 8 * (m & 1) + 2 * pair + (m >> 1);
              words[w][p][m] = load_word(plane + ((token * (D / 8) + 4 * word) ^ (g << 4)));
            }
          }
        }
      constexpr int kStart = kStartsAtMagic ? kMagicBits : 0;
      int start[4] = {kStart, 0, kStart, 0};
      int c[2][4];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        CodeBytes<kKeyBits> rows[4];
        set_rows(rows, words[w]);
        // The two row tiles in turn, so that their chains of products overlap.
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto &above = rows[2 * half], &below = rows[2 * half + 1];
            const uint32_t a0 = above[j], a1 = below[j], a2 = above[j + 4], a3 = below[j + 4];
            const int (&before)[4] = *(w == 0 && j == 0 ? &start : &c[half]);
            mma_bytes<false, true>(c[half], a0, a1, a2, a3, query[w][j], query[w][j + 4], before);
          }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& joined = score[2 * pair + half][r];
          const int lower = c[half][2 * r], upper = c[half][2 * r + 1];
          if constexpr (kJoinsAsFloats)
            joined = fmaf(static_cast<float>(upper), 256.0f, static_cast<float>(lower));
          else
            joined = kStartsAtMagic ? __int_as_float(lower + upper * 256)
                                    : static_cast<float>(lower + upper * 256);
        }
    }
  }

  // Largest score of the first n tokens, in the same unit as `score`, over the warp.
  __device__ __forceinline__ float largest_score(int n, float sign) const {
    float top = -INFINITY;
    if (uniform(n == kTile)) {
#pragma unroll
      for (int i = 0; i < 8; ++i) top = fmaxf(top, fmaxf(sign * score[i][0], sign * score[i][1]));
    } else {
      const int first = 16 * (lane() >> 2);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (first + 8 * r + i < n) top = fmaxf(top, sign * score[i][r]);
    }
#pragma unroll
    for (int o = 4; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(kFull, top, o));
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
    const int first = 16 * (lane() >> 2);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int token = first + 8 * r + i;
        float& x = score[i][r];
        x = fmaf(x, step, bias);
        if (bound > 0.0f) x = bounded_score(x, bound);
        if (token >= n || entry + token < first_seen) x = -INFINITY;
      }
  }

  // Turn the scores of the first n tokens into weights; `flush` ends a segment that they do not fit
  // into. The tile's first token is cached entry `entry`.
  template <class Flush>
  __device__ __forceinline__ void softmax(int n, int entry, const Flush& flush) {
    bool off = tiles == kSegmentTiles;
    if constexpr (kMasked) {
      mask_scores(n, entry);
      n = kTile;
    }
    const float to_score = kMasked ? 1.0f : step, offset = kMasked ? 0.0f : bias;
    float top = fmaf(largest_score(n, 1.0f), to_score, offset);
    if constexpr (kMasked) top = fmaxf(top, -1e30f);
    off |= top > most + kAbove || top < most - kBelow;
    if (uniform(off)) {
      if (tiles > 0) {
        flush();
        start_segment();
      }
      most = top;
    }
    ++tiles;
    const float shift = offset - most + kWeight;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float e = static_cast<float>(byte_shift(i, bits_of_values()));
      uint32_t x[2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
        x[r] = __float_as_uint(exp2_fast(fmaf(score[i][r], to_score, shift - e)) + 8388608.0f);
      weight[i] = transpose_matrix(__byte_perm(x[0], x[1], 0x5140));
    }
    if (uniform(n < kTile)) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int left = n - 32 * (lane() & 3) - i;  // bytes m with 8m < left are tokens
        const uint32_t mask = left <= 0 ? 0u : left > 24 ? kFull : (1u << (left + 7 & ~7)) - 1;
        weight[i] &= mask;
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
    for (int j = 0; j < 4; ++j) {
      const uint32_t a = 0x01010101u << byte_shift(j, kValueBits),
                     b = 0x01010101u << byte_shift(j + 4, kValueBits);
      mma_bytes<false, false>(total, a, a, b, b, weight[j], weight[j + 4]);
    }
    // Row g of row tile i is channel D / 8 * g + 2i, row g + 8 the next: a lane gets D / 8 adjacent
    // channels.
#pragma unroll
    for (int pair = 0; pair < kPaddedDim / 32; ++pair) {
      if (kAny && 32 * pair >= D) continue;
      CodeBytes<kValueBits> rows[4];
      {
        uint32_t words[kValueBits][4];
        const int r = lane() & 7, channel = D / 8 * r + 4 * pair + (lane() >> 3);
#pragma unroll
        for (int p = 0; p < kValueBits; ++p)
          load_matrices(words[p], values + (p * D + (channel ^ r)) * 16);
        set_rows(rows, words);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto &above = rows[2 * half], &below = rows[2 * half + 1];
          const uint32_t a0 = above[j], a1 = below[j], a2 = above[j + 4], a3 = below[j + 4];
          mma_bytes<false, false>(sum[2 * pair + half], a0, a1, a2, a3, weight[j], weight[j + 4]);
        }
    }
  }

  // Add the segment to the warp's result, with the group's value parameters (shared memory: scale,
  // offset).
  template <class Result>
  __device__ __forceinline__ void end_segment(Result& result, const __half* params) {
    const int D = head_dim(), g = lane() >> 2, t = lane() & 3;
    auto both = [](int low, int high) {
      return fmaf(static_cast<float>(high), 256.0f, static_cast<float>(low));
    };
    const float all = both(total[0], total[1]);
    result.begin_column(column(), most - kWeight, all, writes_column());
#pragma unroll
    for (int pair = 0; pair < kPaddedDim / 32; ++pair) {
      if (kAny && 32 * pair >= D) continue;
      const int c = D / 8 * g + 4 * pair;
      __half scale[4], offset[4];
      *reinterpret_cast<uint2*>(scale) = *reinterpret_cast<const uint2*>(params + c);
      *reinterpret_cast<uint2*>(offset) = *reinterpret_cast<const uint2*>(params + D + c);
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int (&pairs)[4] = sum[2 * pair + (i >> 1)];
        x[i] = fmaf(__half2float(scale[i]), both(pairs[2 * (i & 1)], pairs[2 * (i & 1) + 1]),
                    __half2float(offset[i]) * all);
      }
      result.add_four(column(), c, x);
    }
    result.end();
  }
};

}  // namespace vkvx
