// Decode attention on codes of 1 to 8 bits with the fp16 tensor cores.
//
// A word holds 32 codes' bits of one plane, and the tensor core wants pairs of fp16. Planes of one word are first shuffled so that
// each code becomes a field of adjacent bits (nothing to do at 1 bit); `field word & mask` is then a pair of fp16 numbers, code times a power of
// two, because an integer in the low bits of an fp16 is a subnormal number and the tensor core multiplies it exactly. The power of two goes
// into the other operand: the query for scores, the weights for values. So a register of the matrix operand costs one logic instruction.
//
// The sum runs over channels (scores) or tokens (values) in any order. Lane 4g + t of a warp takes word t of its rows alone: pair j of the word
// are its bits j and j + 16. Rows of the score product are tokens 16g + k in block k of 8; transposing that block of the result (movmatrix)
// gives lane 4g + t the weights of column g for tokens 32t + k and 32t + 16 + k, which is pair k of word t of the values.
#pragma once

#include "pairs.cuh"

namespace vkvx {

// A query's dot products with a group's parameters, folded so that a score is step * sum + bias (in units of log2 of a weight).
struct ScoreMap {
  float step, bias;
};

template <int kKeyBits, int kValueBits, int kDim>
struct CodesEngine {
  static constexpr int kColumns = 8;
  static constexpr int kBlocks = kDim > 128 || kKeyBits + kValueBits > 8 ? 1 : kKeyBits + kValueBits == 2 ? 4 : 3;  // of a multiprocessor
  static constexpr int kKeyPlanes = kKeyBits, kValuePlanes = kValueBits, kHeadDim = kDim;
  static constexpr int kWordsOfLane = kDim >= 128 ? kDim / 128 : 1;  // key words that a lane takes of a token
  static constexpr int kPairs = kDim >= 128 ? 16 : 8;                // pairs of each
  static constexpr int kSteps = kDim / 16;
  static constexpr int kWeightShift = 11;  // weights are stored times 2^11, and are at most 2^4
  static constexpr float kMargin = 4.0f;

  uint32_t query[kSteps][2];
  ScoreMap map[2];  // of columns 2t and 2t + 1
  float score[8][4];
  uint32_t weight[16];
  float sum[kDim / 16][4], total[4];
  float most[2];

  __device__ __forceinline__ static int lane() { return threadIdx.x & 31; }

  // First of 4 adjacent channels, number n of the lane's kDim / 16.
  __device__ __forceinline__ static int channel(int n) {
    const int t = lane() & 3;
    if constexpr (kDim >= 128) return 32 * (t + 4 * (n >> 3)) + 4 * (n & 7);
    return 32 * (t >> 1) + 8 * (t & 1) + 16 * (n >> 1) + 4 * (n & 1);
  }

  // Fold the key parameters of a group (shared memory: scale, offset, rms) into the queries (shared memory, times scale * log2 e).
  __device__ __forceinline__ void start_group(const __half* params, const float* queries, int stride, int correction, float limit, const float2* affine) {
    const int g = lane() >> 2, t = lane() & 3;
    float u[kDim / 4];
    float largest = 0.0f, bias = 0.0f, spread = 0.0f;
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      const int c = channel(n);
      const float4 q4 = *reinterpret_cast<const float4*>(queries + g * stride + c + 4 * (c >> 5));
      const float q[4] = {q4.x, q4.y, q4.z, q4.w};
      __half row[3][4];
#pragma unroll
      for (int r = 0; r < 3; ++r) *reinterpret_cast<uint2*>(row[r]) = *reinterpret_cast<const uint2*>(params + r * kDim + c);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u[4 * n + i] = q[i] * __half2float(row[0][i]);
        largest = fmaxf(largest, fabsf(u[4 * n + i]));
        bias = fmaf(q[i], __half2float(row[1][i]), bias);
        const float rest = q[i] * __half2float(row[2][i]);
        spread = fmaf(rest, rest, spread);
      }
    }
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) largest = fmaxf(largest, __shfl_xor_sync(kFull, largest, o));
    // A power of two that brings the largest product to [2^14, 2^15).
    const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23), 30), 230);
    const float factor = __uint_as_float(static_cast<uint32_t>(268 - exponent) << 23);
    const float inverse = __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
    float rounding = 0.0f;
#pragma unroll
    for (int n = 0; n < kDim / 4; ++n) {
      if ((n & 16) == 0 && (kDim >= 128 || n < 8)) {
        constexpr int kSecond = kDim >= 128 ? 16 : 8;
        const int j = kDim >= 128 ? (n & 15) : n;
        const int word = kDim >= 128 ? n >> 5 : 0;
        const int e = field_shift(j, kKeyBits);
        const float down = 1.0f / (1 << e), up = 1 << e;
        const float a = u[n] * factor, b = u[n + kSecond] * factor;
        const __half2 pair = __floats2half2_rn(a * down, b * down);
        const float2 back = __half22float2(pair);
        rounding += (a - back.x * up) + (b - back.y * up);
        query[word * 8 + (j >> 1)][j & 1] = reinterpret_cast<const uint32_t&>(pair);
      }
    }
    // Rounding of the query is made up for at the middle code.
    constexpr float kMiddle = 0.5f * ((1 << kKeyBits) - 1);
    bias = fmaf(rounding * inverse, kMiddle, bias);
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) {
      bias += __shfl_xor_sync(kFull, bias, o);
      spread += __shfl_xor_sync(kFull, spread, o);
    }
    if (correction == VKVX_CORRECTION_EXPECTED) bias += kLog2e * expected_correction(0.5f / (kLog2e * kLog2e) * spread, limit);
    float step = inverse * 16777216.0f;
    if (affine != nullptr) {
      const float2 a = affine[g];
      step *= a.x;
      bias = fmaf(bias, a.x, a.y);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      map[i].step = __shfl_sync(kFull, step, (2 * t + i) * 4);
      map[i].bias = __shfl_sync(kFull, bias, (2 * t + i) * 4);
    }
  }

  __device__ __forceinline__ void start_segment() {
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) total[j] = 0.0f;
    most[0] = most[1] = -1e30f;
  }

  // Position of 16-byte chunk c of a plane of keys in shared memory: tokens 16 apart lie in different banks.
  __device__ __forceinline__ static int place_key_chunk(int c) { return c ^ ((c / (kDim / 8)) & 7); }

  __device__ __forceinline__ void scores(uint32_t keys) {
    const int g = lane() >> 2, t = lane() & 3;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // two row tiles, four blocks of 8 tokens
      uint32_t words[kKeyBits][kWordsOfLane][4];
#pragma unroll
      for (int p = 0; p < kKeyBits; ++p)
#pragma unroll
        for (int w = 0; w < kWordsOfLane; ++w) {
          if constexpr (kDim >= 128) {
            const int token = 16 * (lane() & 7) + 4 * pair + (lane() >> 3);
            load_matrices(words[p][w], keys + (p * kDim + place_key_chunk(token * kWordsOfLane + w)) * 16);
          } else {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const int token = 16 * g + 4 * pair + k;
              const uint32_t at = keys + (p * kDim + place_key_chunk(token >> 1)) * 16 + (token & 1) * 8 + (t >> 1) * 4;
              uint32_t x;
              VKVX_ASM_VOLATILE("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
              words[p][w][k] = x >> (8 * (t & 1));
            }
          }
        }
      // The two row tiles in turn, so that their chains of products overlap.
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 4; ++j) score[2 * pair + half][j] = 0.0f;
#pragma unroll
      for (int w = 0; w < kWordsOfLane; ++w) {
        Pairs<kKeyBits> rows[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            uint32_t planes[kKeyBits];
#pragma unroll
            for (int p = 0; p < kKeyBits; ++p) planes[p] = words[p][w][2 * half + r];
            rows[half][r].set(planes);
          }
#pragma unroll
        for (int j = 0; j < kPairs; j += 2)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t(&q)[2] = query[w * 8 + j / 2];
            mma_half(score[2 * pair + half], rows[half][0][j], rows[half][1][j], rows[half][0][j + 1], rows[half][1][j + 1], q[0], q[1]);
          }
      }
    }
  }

  // Least and greatest score of the first n tokens, of columns 2t and 2t + 1, over the whole warp.
  __device__ __forceinline__ void extremes(int n, float (&low)[2], float (&high)[2]) {
    const int g = lane() >> 2;
    float lo[2] = {INFINITY, INFINITY}, hi[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool valid = 16 * g + 2 * i + (j >> 1) < n;
        lo[j & 1] = fminf(lo[j & 1], valid ? score[i][j] : INFINITY);
        hi[j & 1] = fmaxf(hi[j & 1], valid ? score[i][j] : -INFINITY);
      }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int o = 4; o < 32; o <<= 1) {
        lo[c] = fminf(lo[c], __shfl_xor_sync(kFull, lo[c], o));
        hi[c] = fmaxf(hi[c], __shfl_xor_sync(kFull, hi[c], o));
      }
      low[c] = fmaf(lo[c], map[c].step, map[c].bias);
      high[c] = fmaf(hi[c], map[c].step, map[c].bias);
    }
  }

  // Turn the scores of the first n tokens into weights, and rescale what has been summed if the largest score grew much.
  __device__ __forceinline__ void softmax(int n) {
    const int g = lane() >> 2;
    float top[2];
    if (n == kTile) {
      top[0] = fmaxf(score[0][0], score[0][2]);
      top[1] = fmaxf(score[0][1], score[0][3]);
#pragma unroll
      for (int i = 1; i < 8; ++i) {
        top[0] = fmaxf(top[0], fmaxf(score[i][0], score[i][2]));
        top[1] = fmaxf(top[1], fmaxf(score[i][1], score[i][3]));
      }
    } else {
      top[0] = top[1] = -INFINITY;
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (16 * g + 2 * i + (j >> 1) < n) top[j & 1] = fmaxf(top[j & 1], score[i][j]);
    }
    bool grew = false;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int o = 4; o < 32; o <<= 1) top[c] = fmaxf(top[c], __shfl_xor_sync(kFull, top[c], o));
      top[c] = fmaf(top[c], map[c].step, map[c].bias);
      grew |= top[c] > most[c] + kMargin;
    }
    if (uniform(grew)) {
      float fade[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float now = fmaxf(most[c], top[c]);
        fade[c] = exp2_fast(most[c] - now);
        most[c] = now;
      }
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] *= fade[j & 1];
#pragma unroll
      for (int j = 0; j < 4; ++j) total[j] *= fade[j & 1];
    }
    const float shift[2] = {map[0].bias - most[0] + kWeightShift, map[1].bias - most[1] + kWeightShift};
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const float e = static_cast<float>(field_shift(k, kValueBits));
      float x = exp2_fast(fmaf(score[k >> 1][2 * (k & 1)], map[0].step, shift[0] - e));
      float y = exp2_fast(fmaf(score[k >> 1][2 * (k & 1) + 1], map[1].step, shift[1] - e));
      if (n < kTile && 16 * g + k >= n) x = y = 0.0f;
      weight[k] = transpose_matrix(pack_half2(x, y));
    }
  }

  __device__ __forceinline__ void values(uint32_t values) {
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      const uint32_t a = 0x00010001u << field_shift(j, kValueBits), b = 0x00010001u << field_shift(j + 1, kValueBits);
      mma_half(total, a, a, b, b, weight[j], weight[j + 1]);
    }
    // Row tiles at a time: independent chains of products, as many as registers allow.
    constexpr int kPairsAtOnce = kValueBits == 1 ? 2 : 1;
#pragma unroll
    for (int first = 0; first < kDim / 32; first += kPairsAtOnce) {
      Pairs<kValueBits> rows[kPairsAtOnce][4];
#pragma unroll
      for (int i = 0; i < kPairsAtOnce; ++i) {
        uint32_t words[kValueBits][4];
#pragma unroll
        for (int p = 0; p < kValueBits; ++p) load_matrices(words[p], values + (p * kDim + 32 * (first + i) + lane()) * 16);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          uint32_t planes[kValueBits];
#pragma unroll
          for (int p = 0; p < kValueBits; ++p) planes[p] = words[p][r];
          rows[i][r].set(planes);
        }
      }
#pragma unroll
      for (int j = 0; j < 16; j += 2)
#pragma unroll
        for (int tile = 0; tile < 2 * kPairsAtOnce; ++tile) {
          const auto& low = rows[tile >> 1][2 * (tile & 1)];
          const auto& high = rows[tile >> 1][2 * (tile & 1) + 1];
          mma_half(sum[2 * first + tile], low[j], high[j], low[j + 1], high[j + 1], weight[j], weight[j + 1]);
        }
    }
  }

  // Add the segment to the warp's result, with the group's value parameters (shared memory: scale, offset).
  template <class Result>
  __device__ __forceinline__ void end_segment(Result& result, const __half* params) {
    constexpr float kUnit = 8192.0f;  // 2^24 / 2^kWeightShift
    const int g = lane() >> 2;
    result.begin(most, total, kUnit);
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int c = 16 * i + 8 * r + g;
        const float scale = __half2float(params[c]) * kUnit, offset = __half2float(params[kDim + c]) * kUnit;
        result.add(c, fmaf(scale, sum[i][2 * r], offset * total[0]), fmaf(scale, sum[i][2 * r + 1], offset * total[1]));
      }
    result.end();
  }
};

}  // namespace vkvx
