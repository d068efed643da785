// What a warp of prefill does with its positions: scores, weights and sums, all in registers.
#pragma once

#include "prefill_codes.cuh"

namespace vkvx {

template <bool kBfloat>
__device__ __forceinline__ float2 unpack_pair(uint32_t x) {
  if constexpr (kBfloat)
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
  return __half22float2(reinterpret_cast<const __half2&>(x));
}

template <bool kBfloat>
__device__ __forceinline__ void mma_pairs(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  if constexpr (kBfloat)
    mma_bfloat(d, a[0], a[1], a[2], a[3], b0, b1);
  else
    mma_half(d, a[0], a[1], a[2], a[3], b0, b1);
}

// The lowest n bits.
__device__ __forceinline__ uint64_t lowest_bits(int n) {
  return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1;
}

// Positions of one warp, kTiles times 16: their scores, weights and sums. A lane has rows g and g +
// 8 of each tile, columns 2t and 2t + 1 of eight.
template <int kDim, int kTiles, bool kBfloat>
struct PrefillWarp {
  static constexpr int kPitch = kDim * 2, kSteps = kDim / 16, kValues = prefill_values(kDim);

  // Address of a chunk that is `chunk` (even) further in its row than that of `address`, whose own
  // is 0 or 1.
  static __device__ __forceinline__ uint32_t further(uint32_t address, int chunk) {
    constexpr int kTurn = kDim / 8 % 8 ? 3 : 7;
    return (address ^ (chunk & kTurn) << 4) + ((chunk & ~kTurn) << 4);
  }

  // What correction `expected` adds for the warp's positions in a group whose errors are `rms`, in
  // units of log2: to `maps`, [16 kTiles].
  static __device__ __forceinline__ void map_expected(int g, int t, float2* maps, uint32_t query_at,
                                                      const __half* rms, const VkvxParams& p) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float spread[2] = {};
#pragma unroll 2
      for (int i = 0; i < kSteps; ++i) {
        uint32_t q[4];
        load_matrices(q, further(query_at, 2 * i) + 16 * m * kPitch);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 x = unpack_pair<kBfloat>(q[r]);
          const float2 error = __half22float2(
              *reinterpret_cast<const __half2*>(rms + 16 * i + 8 * (r >> 1) + 2 * t));
          spread[r & 1] =
              fmaf(x.x * error.x, x.x * error.x, fmaf(x.y * error.y, x.y * error.y, spread[r & 1]));
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        spread[r] += __shfl_xor_sync(kFull, spread[r], 1);
        spread[r] += __shfl_xor_sync(kFull, spread[r], 2);
        const float excess =
            kLog2e * expected_correction(0.5f * p.scale * p.scale * spread[r], p.correction_limit);
        if (t == 0) maps[16 * m + 8 * r + g] = make_float2(p.scale * kLog2e, excess);
      }
    }
    __syncwarp();
  }

  // Correction `affine`: from the extremes of all pictures' scores to maps.
  static __device__ __forceinline__ void map_affine(float2* maps, const VkvxParams& p) {
    const int lane = threadIdx.x & 31;
    if (lane < 16 * kTiles) {
      const float2 extremes = maps[lane];
      const float low = extremes.x * p.scale, high = extremes.y * p.scale;
      // Not quite 0, so that -inf stays it.
      const float slope = high > low ? fmaxf(1e-30f, (high - p.tau - low) / (high - low)) : 1.0f;
      maps[lane] = make_float2(p.scale * kLog2e * slope, kLog2e * low * (1.0f - slope));
    }
    __syncwarp();
  }

  // Products of the queries with a tile of keys.
  static __device__ __forceinline__ void multiply_keys(float (&s)[kTiles][8][4], uint32_t query_at,
                                                       uint32_t key_at) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t q[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
        load_matrices(q[m], further(query_at, 2 * i) + 16 * m * kPitch);
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t k[4];
        load_matrices(k, further(key_at, 2 * i) + 8 * n * kPitch);
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) mma_pairs<kBfloat>(s[m][n + e], q[m], k[2 * e], k[2 * e + 1]);
      }
    }
  }

  // Scores of keys that are not `valid`, or past what an own position sees, become -inf: the warp's
  // first one sees `before` keys.
  static __device__ __forceinline__ void mask_scores(int g, int t, float (&s)[kTiles][8][4],
                                                     uint64_t valid, bool own, int before) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint64_t seen =
            (own ? valid & lowest_bits(before + 16 * m + 8 * r + g) : valid) >> (2 * t);
        const uint32_t half[2] = {static_cast<uint32_t>(seen), static_cast<uint32_t>(seen >> 32)};
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (!(half[n >> 2] >> (8 * (n & 3) + j) & 1)) s[m][n][2 * r + j] = -INFINITY;
      }
  }

  // The same by what each of the warp's positions sees: `first` is the first key among the visual
  // entries, the text rows, or the call's own positions.
  static __device__ __forceinline__ void mask_sights(int g, int t, float (&s)[kTiles][8][4],
                                                     uint64_t valid, const Sight* sights,
                                                     bool visual, bool own, int first) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Sight sight = sights[16 * m + 8 * r + g];
        const int from = visual ? sight.visual : own ? sight.first : sight.text;
        uint64_t seen = valid & ~lowest_bits(from - first);
        if (own) seen &= lowest_bits(sight.last + 1 - first);
        seen >>= 2 * t;
        const uint32_t half[2] = {static_cast<uint32_t>(seen), static_cast<uint32_t>(seen >> 32)};
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (!(half[n >> 2] >> (8 * (n & 3) + j) & 1)) s[m][n][2 * r + j] = -INFINITY;
      }
  }

  // Mapped and bounded scores, in units of log2.
  static __device__ __forceinline__ void bound_scores(int g, float (&s)[kTiles][8][4],
                                                      const float2* maps, bool mapped, float scale,
                                                      float bound) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 map = mapped ? maps[16 * m + 8 * r + g] : make_float2(scale * kLog2e, 0.0f);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = s[m][n][2 * r + j];
            x = bounded_score(fmaf(x, map.x, map.y), bound);
          }
      }
  }

  // Takes the scores into the extremes in `maps`.
  static __device__ __forceinline__ void take_extremes(int g, int t, const float (&s)[kTiles][8][4],
                                                       float2* maps) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float low = INFINITY, high = -INFINITY;
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float x = s[m][n][2 * r + j];
            low = fminf(low, x == -INFINITY ? INFINITY : x);
            high = fmaxf(high, x);
          }
#pragma unroll
        for (int o = 1; o < 4; o <<= 1) {
          low = fminf(low, __shfl_xor_sync(kFull, low, o));
          high = fmaxf(high, __shfl_xor_sync(kFull, high, o));
        }
        float2& extremes = maps[16 * m + 8 * r + g];
        if (t == 0) extremes = make_float2(fminf(extremes.x, low), fmaxf(extremes.y, high));
      }
    __syncwarp();
  }

  float sum[kTiles][kValues / 8][4], most[kTiles][2], total[kTiles][2];

  __device__ __forceinline__ PrefillWarp() : sum{}, total{} {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) most[m][0] = most[m][1] = -1e30f;
  }

  // Scores to weights, 2^(step * score + bias - most), with a step and a bias of each position in
  // `maps`, if `mapped`. Sums are rescaled only if the greatest score grew much: weights are at
  // most 2^8.
  // kMasked: scores may be bounded, then `maps` are applied before.
  template <bool kMasked>
  __device__ __forceinline__ void softmax(int g, float (&s)[kTiles][8][4], const float2* maps,
                                          bool mapped, const VkvxParams& p) {
    float scale = p.scale;
    if (kMasked && p.softcap > 0.0f) {
      bound_scores(g, s, maps, mapped, scale, p.softcap * kLog2e);
      mapped = false;
      scale = 1.0f / kLog2e;
    }
    float step[kTiles][2], bias[kTiles][2], top[kTiles][2];
    bool grew = false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 map = mapped ? maps[16 * m + 8 * r + g] : make_float2(scale * kLog2e, 0.0f);
        step[m][r] = map.x, bias[m][r] = map.y;
        float x = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < 8; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        x = fmaxf(x, __shfl_xor_sync(kFull, x, 1));
        x = fmaxf(x, __shfl_xor_sync(kFull, x, 2));
        top[m][r] = fmaf(x, map.x, map.y);
        grew |= top[m][r] > most[m][r] + 8.0f;
      }
    if (uniform(grew)) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float now = fmaxf(most[m][r], top[m][r]), fade = exp2_fast(most[m][r] - now);
          most[m][r] = now;
          total[m][r] *= fade;
#pragma unroll
          for (int n = 0; n < kValues / 8; ++n)
            sum[m][n][2 * r] *= fade, sum[m][n][2 * r + 1] *= fade;
        }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = s[m][n][2 * r + j];
            x = exp2_fast(fmaf(x, step[m][r], bias[m][r] - most[m][r]));
            total[m][r] += x;
          }
  }

  // Adds a tile of values, fp16 or bf16 numbers, times the weights.
  template <bool kAsBfloat>
  __device__ __forceinline__ void add_values(const float (&s)[kTiles][8][4], uint32_t value_at) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t w[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float (&pair)[4] = s[m][2 * i + (r >> 1)];
          w[m][r] = pack_pair<kAsBfloat>(pair[2 * (r & 1)], pair[2 * (r & 1) + 1]);
        }
#pragma unroll
      for (int n = 0; n < kValues / 8; n += 2) {
        uint32_t v[4];
        load_matrices_transposed(v, further(value_at, n) + 16 * i * kValues * 2);
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            mma_pairs<kAsBfloat>(sum[m][n + e], w[m], v[2 * e], v[2 * e + 1]);
      }
    }
  }

  // Normalised sums to the output, whose row 0 is the warp's first position: those of `rows`, and
  // zeros where `is_token` says no.
  template <class IsToken>
  __device__ __forceinline__ void store(int g, int t, uint16_t* output, int first, int positions,
                                        IsToken is_token) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total[m][r] += __shfl_xor_sync(kFull, total[m][r], 1);
        total[m][r] += __shfl_xor_sync(kFull, total[m][r], 2);
        const int row = first + 16 * m + 8 * r + g;
        if (row >= positions) continue;
        const bool token = is_token(row);
        const float inverse = token ? 1.0f / total[m][r] : 0.0f;
        uint32_t* to = reinterpret_cast<uint32_t*>(output + static_cast<int64_t>(row) * kDim) + t;
#pragma unroll
        for (int n = 0; n < kValues / 8; ++n) {
          float x = sum[m][n][2 * r] * inverse, y = sum[m][n][2 * r + 1] * inverse;
          if constexpr (!kBfloat) x = within_half(x), y = within_half(y);
          to[4 * n] = token ? pack_pair<kBfloat>(x, y) : 0u;
        }
      }
  }
};

}  // namespace vkvx
