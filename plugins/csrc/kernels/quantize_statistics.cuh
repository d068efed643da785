// What quantize_registers.cuh finds out about the tokens: 8 channels of a group in a warp's
// registers, their sums, extremes, order statistics and Lloyd's passes.
#pragma once

#include "append.cuh"

namespace vkvx {

constexpr int kQuantizeWarps = 4;        // 32 channels per block: one word of a key
constexpr uint32_t kOnes = 0x3c003c00u;  // 1.0 twice
constexpr uint32_t kNone = 0xfbfffbffu;  // the least number twice: what is no token

__device__ __forceinline__ __half2 as_half2(uint32_t x) { return reinterpret_cast<__half2&>(x); }
__device__ __forceinline__ uint32_t as_bits(__half2 x) { return reinterpret_cast<uint32_t&>(x); }

// A FP16 number as an integer of the same order, and back. -0 is 0.
__device__ __forceinline__ int order_of_half(float x) {
  const int bits = __half_as_ushort(__float2half_rn(x));
  return bits & 0x8000 ? -(bits & 0x7fff) : bits;
}
__device__ __forceinline__ float half_of_order(int order) {
  return __half2float(
      __ushort_as_half(static_cast<unsigned short>(order < 0 ? 0x8000 - order : order)));
}

// The sum over a quad of lanes.
template <class Number>
__device__ __forceinline__ Number add_over_quad(Number x) {
  x += __shfl_xor_sync(kFull, x, 2);
  return x + __shfl_xor_sync(kFull, x, 1);
}

struct LeastPair {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const {
    return as_bits(__hmin2(as_half2(a), as_half2(b)));
  }
};
struct MostPair {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const {
    return as_bits(__hmax2(as_half2(a), as_half2(b)));
  }
};

// The least or greatest of both halves over a quad of lanes.
template <class Combine>
__device__ __forceinline__ float extreme_over_quad(uint32_t x, Combine combine) {
  x = combine(x, x >> 16 | x << 16);
  x = combine(x, __shfl_xor_sync(kFull, x, 2));
  x = combine(x, __shfl_xor_sync(kFull, x, 1));
  return __half2float(__ushort_as_half(static_cast<unsigned short>(x & 0xffff)));
}

// A number in both halves, rounded to FP16.
__device__ __forceinline__ uint32_t twice(float x) {
  return as_bits(__half2half2(__float2half_rn(x)));
}

// FP16 numbers that lane 4c holds for channel c, as pairs.
__device__ __forceinline__ void share_pairs(uint32_t (&pairs)[4], __half mine) {
  const uint32_t bits = __half_as_ushort(mine), other = __shfl_xor_sync(kFull, bits, 4);
  const uint32_t pair = threadIdx.x & 4 ? other | bits << 16 : bits | other << 16;
#pragma unroll
  for (int j = 0; j < 4; ++j) pairs[j] = __shfl_sync(kFull, pair, 8 * j);
}

__device__ __forceinline__ void share(float (&all)[8], float mine) {
#pragma unroll
  for (int c = 0; c < 8; ++c) all[c] = __shfl_sync(kFull, mine, 4 * c);
}

// Which lanes' low and high halves are above the threshold's.
__device__ __forceinline__ void ballots_above(uint32_t x, uint32_t threshold, uint32_t* low,
                                              uint32_t* high) {
  asm("{.reg .pred p, q;\n setp.gt.f16x2 p|q, %2, %3;\n vote.sync.ballot.b32 %0, p, -1;\n "
      "vote.sync.ballot.b32 %1, q, -1;}"
      : "=r"(*low), "=r"(*high)
      : "r"(x), "r"(threshold));
}

// Where shared memory holds 8 channels of a token, `warp` of the block's 4 times 8: so that warps
// read and write without bank conflicts.
__device__ __forceinline__ int place_of(int token, int warp) {
  return token * kQuantizeWarps + (warp ^ (token >> 1 & 3));
}
constexpr int kStepBytes = 32 * kQuantizeWarps * sizeof(uint4);  // of a step of 32 tokens there

// 8 channels of a group, less a pivot; all but `tiles`, `count` and `copies` is that of channel
// lane / 4. Pair j of step s holds its tokens 32 s + 8 j + 2 (lane % 4) and the next, or kNone.
// Only the first kHeld steps are kept in registers: more warps gain more than registers save.
template <int kSteps, int kHeld>
struct Channels {
  uint32_t held[kHeld][4];
  uint32_t rows,
      words;  // in shared memory: this lane's row of step 0, and its words of the transposed pairs
  int tiles, count, copies;  // `copies` numbers of the last tile are no tokens
  float pivot;               // number = unit * (x + pivot)
  float unit;
  float sum, low, high;  // of the tokens

  // Calls visit(pairs, step) for the steps of tiles in use.
  template <class Visit>
  __device__ __forceinline__ void each_step(Visit visit) const {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s % 4 == 0 && s / 4 >= tiles) break;
      if (s < kHeld) {
        visit(held[s], s);
      } else {
        uint32_t pairs[4];
        load_matrices_transposed(pairs, rows + s * kStepBytes);
        visit(pairs, s);
      }
    }
  }

  // The same from a tile on for functions that change pairs, which go to shared memory too.
  template <class Change>
  __device__ __forceinline__ void change_steps(Change change, int from = 0) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s % 4 == 0 && s / 4 >= tiles) break;
      if (s / 4 < from) continue;
      uint32_t pairs[4];
      if (s < kHeld) {
#pragma unroll
        for (int j = 0; j < 4; ++j) pairs[j] = held[s][j];
      } else {
        load_matrices_transposed(pairs, rows + s * kStepBytes);
      }
      change(pairs, s);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (s < kHeld) held[s][j] = pairs[j];
        store_word(words + s * kStepBytes + j * kStepBytes / 4, transpose_matrix(pairs[j]));
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ float n() const { return static_cast<float>(count); }
  __device__ __forceinline__ float mean() const { return sum / n(); }

  // The sum of the numbers, which products with ones add up, 16 times 16 at a time.
  __device__ __forceinline__ float add() const {
    float sums[2][4] = {};
    each_step([&](const uint32_t (&x)[4], int s) {
      mma_half(sums[s % 2], x[0], x[1], x[2], x[3], kOnes, kOnes);
    });
    return (sums[0][0] + sums[0][2]) + (sums[1][0] + sums[1][2]);
  }

  // The root mean square of the tokens less their mean.
  __device__ __forceinline__ float deviation() const {
    const float middle = mean();
    float squares[2] = {};
    each_step([&](const uint32_t (&x)[4], int s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = __half22float2(as_half2(x[j]));
        const int token = 32 * s + 8 * j + 2 * (threadIdx.x % 4);
        const float first = token < count ? pair.x - middle : 0.0f,
                    second = token + 1 < count ? pair.y - middle : 0.0f;
        squares[0] = fmaf(first, first, squares[0]);
        squares[1] = fmaf(second, second, squares[1]);
      }
    });
    return sqrtf(add_over_quad(squares[0] + squares[1]) / n());
  }

  // How many tokens are above a threshold, and their sum.
  __device__ __forceinline__ float add_above(float threshold, float* many) const {
    const uint32_t thresholds = twice(threshold);
    float sums[2][4] = {};
    __half2 counts[4] = {};
    each_step([&](const uint32_t (&x)[4], int s) {
      uint32_t numbers[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const __half2 is_above = as_half2(above(x[j], thresholds));
        counts[j] = __hadd2(counts[j], is_above);
        numbers[j] = as_bits(__hmul2(as_half2(x[j]), is_above));
      }
      mma_half(sums[s % 2], numbers[0], numbers[1], numbers[2], numbers[3], kOnes, kOnes);
    });
    const float2 pair =
        __half22float2(__hadd2(__hadd2(counts[0], counts[1]), __hadd2(counts[2], counts[3])));
    *many = add_over_quad(pair.x + pair.y);
    return (sums[0][0] + sums[0][2]) + (sums[1][0] + sums[1][2]);
  }

  // Reads the tokens, by all warps of the block, into `staged` [group_size][4]; false if there is
  // nothing to store or no group is free.
  __device__ __forceinline__ bool load(const VkvxParams& p, bool is_key, int b, int head, int g,
                                       int first_channel, uint4* staged, int* group) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, slot = p.slot[b],
              groups = p.visual_capacity / p.group_size;
    if (slot < 0) return false;
    const int* index = p.visual_index + static_cast<int64_t>(b) * p.visual_entries +
                       static_cast<int64_t>(g) * p.group_size;
    int at[kSteps], valid = 0, last = 0, filled = 0;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      at[s] = 32 * s + lane < p.group_size ? index[32 * s + lane] : -1;
      valid += at[s] >= 0;
      last = max(last, at[s]);
    }
    for (int i = lane; i < groups; i += 32)
      filled += p.visual_count[static_cast<int64_t>(slot) * groups + i] > 0;
#pragma unroll
    for (int o = 16; o; o >>= 1) {
      valid += __shfl_xor_sync(kFull, valid, o);
      filled += __shfl_xor_sync(kFull, filled, o);
    }
    last = reduce_max(last);
    count = reduce_max(valid);  // the same in all lanes, and so the compiler knows
    tiles = (count + kTile - 1) / kTile;
    copies = tiles * kTile - count;
    *group = reduce_max(filled) + g;
    if (count == 0 || *group >= groups) return false;
    const int64_t* stride = is_key ? p.key_stride : p.value_stride;
    const uint16_t* source = static_cast<const uint16_t*>(is_key ? p.key : p.value) +
                             b * stride[0] + head * stride[1] + first_channel;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s % 4 == 0 && s / 4 >= tiles) break;
      const int token = 32 * s + 8 * warp + lane / 4,
                position = __shfl_sync(kFull, at[s], 8 * warp + lane / 4);
      const uint16_t* from = source + (position < 0 ? last : position) * stride[2] + 8 * (lane % 4);
      copy_async(shared_address(staged + place_of(token, lane % 4)), from);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    rows = shared_address(staged + place_of(lane, warp));
    words = shared_address(staged + place_of(lane / 4, warp)) + 4 * (lane % 4);
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      if (s % 4 == 0 && s / 4 >= tiles) break;
      load_matrices_transposed(held[s], rows + s * kStepBytes);
    }
    unit = 1.0f;
    const bool bfloat = p.dtype == VKVX_BFLOAT16;
    if (bfloat) from_bfloat();
    examine(source + static_cast<int64_t>(last) * stride[2] + 8 * warp, bfloat);
    if (copies)
      change_steps(
          [&](uint32_t (&x)[4], int s) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int token = 32 * s + 8 * j + 2 * (lane % 4);
              if (token + 1 >= count)
                x[j] = token < count ? __byte_perm(x[j], kNone, 0x7610) : kNone;
            }
          },
          tiles - 1);
    return true;
  }

  // BF16 to FP16 by the power of two that puts the greatest magnitude of the channel below 2^15,
  // rounding only what is less than 2^-31 of it.
  __device__ __forceinline__ void from_bfloat() {
    float most = 1e-30f;
    auto numbers = [&](uint32_t bits) {
      return make_float2(clean(__uint_as_float(bits << 16)),
                         clean(__uint_as_float(bits & 0xffff0000u)));
    };
    each_step([&](const uint32_t (&x)[4], int) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 v = numbers(x[j]);
        most = fmaxf(most, fmaxf(fabsf(v.x), fabsf(v.y)));
      }
    });
    most = fmaxf(most, __shfl_xor_sync(kFull, most, 2));
    most = fmaxf(most, __shfl_xor_sync(kFull, most, 1));
    const float factor = ldexpf(1.0f, 14 - ilogbf(most));
    change_steps([&](uint32_t (&x)[4], int) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 v = numbers(x[j]);
        x[j] = pack_half2(v.x * factor, v.y * factor);
      }
    });
    unit = 1.0f / factor;
  }

  // Cleans the numbers if some are not finite, then finds sum, extremes and pivot. The last tile is
  // filled up with copies of the last token.
  __device__ __forceinline__ void examine(const uint16_t* last_token, bool bfloat) {
    const uint16_t bits = last_token[(threadIdx.x & 31) / 4];
    float copy = clean(bfloat ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                              : __half2float(__ushort_as_half(bits))) /
                 unit;
    auto find_sum = [&] { sum = add() - static_cast<float>(copies) * copy; };
    pivot = 0.0f;
    find_sum();
    if (!__all_sync(kFull, isfinite(sum))) {
      change_steps([&](uint32_t (&x)[4], int) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 v = __half22float2(as_half2(x[j]));
          x[j] = pack_half2(clean(v.x), clean(v.y));
        }
      });
      find_sum();
    }
    uint32_t least[2] = {held[0][0], held[0][0]}, most[2] = {held[0][0], held[0][0]};
    each_step([&](const uint32_t (&x)[4], int) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        least[j % 2] = LeastPair()(least[j % 2], x[j]);
        most[j % 2] = MostPair()(most[j % 2], x[j]);
      }
    });
    low = extreme_over_quad(LeastPair()(least[0], least[1]), LeastPair());
    high = extreme_over_quad(MostPair()(most[0], most[1]), MostPair());
    // Where all numbers lie within a factor of 2, differences from the least are exact, and sums
    // lose nothing to what they share.
    const bool near = (low > 0.0f && high <= 2.0f * low) || (high < 0.0f && low >= 2.0f * high);
    if (!__any_sync(kFull, near)) return;
    pivot = near ? low : 0.0f;
    const __half2 pivots = as_half2(twice(pivot));
    change_steps([&](uint32_t (&x)[4], int) {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = as_bits(__hsub2(as_half2(x[j]), pivots));
    });
    copy -= pivot;
    low -= pivot;
    high -= pivot;
    find_sum();
  }

  // 1.0 where a number is above the threshold, else 0.
  static __device__ __forceinline__ uint32_t above(uint32_t pair, uint32_t threshold) {
    return as_bits(__hgt2(as_half2(pair), as_half2(threshold)));
  }

  // Quantiles `alpha` and 1 - `alpha`. Lanes 0 and 1 of a quad search the lower, 2 and 3 the upper:
  // a number so that as many tokens are at or below it as the rank says, by secants from a guess,
  // and bisection where that is slow.
  __device__ __forceinline__ void find_quantiles(float alpha, float* lower, float* upper) const {
    const bool is_upper = threadIdx.x & 2;
    const float q = is_upper ? static_cast<float>(1.0 - static_cast<double>(alpha)) : alpha,
                position = q * (n() - 1.0f);
    const float rank = floorf(position), wanted = rank + 1.0f;
    // A bell of the tokens' mean distance from their mean, and the normal quantile to 2 digits.
    float many_above;
    const float sum_above = add_above(mean(), &many_above);
    const float spread = fmaxf(2.5066f * (sum_above - many_above * mean()) / n(), 1e-7f),
                z = 4.91f * (__powf(q, 0.14f) - __powf(1.0f - q, 0.14f));
    float slope = 0.4f * n() * __expf(-0.5f * z * z) / spread, next = fmaf(z, spread, mean());
    int a = order_of_half(low) - 1,
        b = order_of_half(
            high);  // at or below a are `under` <= rank tokens, at or below b `over` > rank
    float under = 0.0f, over = n(), last = 0.0f, last_found = -1.0f;
    uint32_t thresholds[2];  // of the lower, the upper search
    auto share_thresholds = [&](float mine) {
      const uint32_t both = twice(mine), others = __shfl_xor_sync(kFull, both, 2);
      thresholds[0] = is_upper ? others : both;
      thresholds[1] = is_upper ? both : others;
    };
    for (int pass = 0;; ++pass) {
      const bool done = over == wanted || b - a <= 1;
      if (__all_sync(kFull, done)) break;
      int probe = order_of_half(fminf(fmaxf(next, half_of_order(a)), half_of_order(b)));
      if (pass >= 8 && pass % 2) probe = (a + b) >> 1;
      probe = done ? b : min(max(probe, a + 1), b - 1);
      const float mine = half_of_order(probe);
      share_thresholds(mine);
      // Products of the lower's ones and zeros over the upper's with ones.
      float counts[4][4] = {};
      each_step([&](const uint32_t (&x)[4], int s) {
#pragma unroll
        for (int j = 0; j < 4; j += 2)
          mma_half(counts[2 * (s % 2) + j / 2], above(x[j], thresholds[0]),
                   above(x[j], thresholds[1]), above(x[j + 1], thresholds[0]),
                   above(x[j + 1], thresholds[1]), kOnes, kOnes);
      });
      auto total = [&](int i) {
        return (counts[0][i] + counts[1][i]) + (counts[2][i] + counts[3][i]);
      };
      const float many = is_upper ? total(2) : total(0);
      const float found = n() - many;
      if (done) continue;
      if (found > rank)
        b = probe, over = found;
      else
        a = probe, under = found;
      const float rise = __fdividef(found - last_found, mine - last);
      if (last_found >= 0.0f && rise > 0.0f && rise < INFINITY) slope = rise;
      last = mine;
      last_found = found;
      next = mine + __fdividef(wanted - found, slope);
      const float from = half_of_order(a), to = half_of_order(b);
      if (!(next > from && next < to))
        next = from + (to - from) * __fdividef(wanted - under, over - under);
    }
    // The tokens on either side of b.
    share_thresholds(half_of_order(b));
    constexpr uint32_t kLeast = 0xfc00fc00u, kMost = 0x7c007c00u;
    uint32_t below[2] = {kLeast, kLeast}, beyond[2] = {kMost, kMost};
#pragma unroll 2
    for (int s = 0; s < 4 * tiles; ++s) {
      uint32_t pairs[4];
      load_matrices_transposed(pairs, rows + s * kStepBytes);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          // A comparison's all ones, added, make a number NaN, which extremes pass over.
          const __half2 pair = as_half2(pairs[j]), threshold = as_half2(thresholds[side]);
          below[side] = MostPair()(below[side],
                                   as_bits(__hadd2(pair, as_half2(__hgt2_mask(pair, threshold)))));
          beyond[side] = LeastPair()(
              beyond[side], as_bits(__hadd2(pair, as_half2(__hle2_mask(pair, threshold)))));
        }
    }
    const float here[2] = {extreme_over_quad(below[0], MostPair()),
                           extreme_over_quad(below[1], MostPair())};
    const float above_it[2] = {extreme_over_quad(beyond[0], LeastPair()),
                               extreme_over_quad(beyond[1], LeastPair())};
    const float at = is_upper ? here[1] : here[0], next_one = is_upper ? above_it[1] : above_it[0];
    const float after = over > wanted || wanted >= n() ? at : next_one;
    const float mine = at + (after - at) * (position - rank),
                others = __shfl_xor_sync(kFull, mine, 2);
    *lower = is_upper ? others : mine;
    *upper = is_upper ? mine : others;
  }

  // Lloyd's algorithm for two levels.
  __device__ __forceinline__ void find_two_levels(float* lower, float* upper) const {
    float threshold = mean(), before = INFINITY;
    for (int round = 0; round < kLloydIterations; ++round) {
      const float mine =
          __half2float(__float2half_rd(threshold));  // no FP16 number lies between the two
      if (__all_sync(kFull, mine == before)) break;
      before = mine;
      float many;
      const float above_it = add_above(mine, &many);
      // These divisions are off by 2 FP32 ulp at most, and do not branch.
      const float over = __fdividef(above_it, many), under = __fdividef(sum - above_it, n() - many);
      *upper = many > 0.0f ? over : threshold;
      *lower = many < n() ? under : threshold;
      threshold = (*lower + *upper) / 2.0f;
    }
  }

  // Lloyd's algorithm for evenly spaced levels: codes, then the least squares fit.
  __device__ __forceinline__ void fit_levels(float top, float* lower, float* step) const {
    const float middle = mean();
    *lower -= middle;
    for (int round = 0; round < kLloydIterations; ++round) {
      const float slope = 1.0f / ((*step > 0.0f ? *step : 1.0f) * top), shift = -*lower * slope;
      float codes[2] = {}, squares[2] = {}, products[2] = {};
      auto code_of = [&](float u) {
        return fmaf(__saturatef(fmaf(u, slope, shift)), top, kMagic) - kMagic;
      };
      each_step([&](const uint32_t (&x)[4], int) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t bits = x[j];
          asm volatile(""
                       : "+r"(bits));  // or the compiler would convert all numbers before the first
                                       // round, and spill them
          const float2 pair = __half22float2(as_half2(bits));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float u = (i ? pair.y : pair.x) - middle, code = code_of(u);
            codes[i] += code;
            squares[i] = fmaf(code, code, squares[i]);
            products[i] = fmaf(code, u, products[i]);
          }
        }
      });
      const float u = -kHalfMax - middle, code = code_of(u);  // of what is no token
      const int whole = static_cast<int>(code);
      const int64_t all = add_over_quad(static_cast<int>(codes[0] + codes[1])) - copies * whole;
      const int64_t all_squares =
          add_over_quad(static_cast<int>(squares[0]) + static_cast<int>(squares[1])) -
          copies * whole * whole;
      const float product =
          add_over_quad(products[0] + products[1]) - static_cast<float>(copies) * code * u;
      const int64_t spread = count * all_squares - all * all;
      if (spread > 0) {
        *step = product / (static_cast<float>(spread) / n());  // the mean of u is 0
        *lower = -*step * (static_cast<float>(all) / n());
      }
    }
    *lower += middle;
  }
};

}  // namespace vkvx
