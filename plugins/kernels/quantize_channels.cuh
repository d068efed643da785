// 8 channels of a group in a warp's registers: extremes, sums, order statistics and Lloyd's passes; quantize.cuh uses them.
#pragma once

#include "append.cuh"

namespace vkvx {

constexpr int kQuantizeWarps = 4;    // 32 channels a block: one word of a key
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, halves to even, in the low bits

__device__ __forceinline__ __half2 as_half2(uint32_t x) { return reinterpret_cast<__half2&>(x); }
__device__ __forceinline__ uint32_t as_bits(__half2 x) { return reinterpret_cast<uint32_t&>(x); }

// A FP16 number as an integer of the same order, and back. -0 is 0.
__device__ __forceinline__ int order_of_half(float x) {
  const int bits = __half_as_ushort(__float2half_rn(x));
  return bits & 0x8000 ? -(bits & 0x7fff) : bits;
}
__device__ __forceinline__ float half_of_order(int order) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(order < 0 ? 0x8000 - order : order)));
}

// Of 8 numbers a lane, one a channel: the sum over lanes q, q + 4, ... of channel lane / 4.
template <class Number>
__device__ __forceinline__ Number add_over_quads(const Number (&x)[8]) {
  Number y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool up = threadIdx.x & 16;
    y[i] = (up ? x[i + 4] : x[i]) + __shfl_xor_sync(kFull, up ? x[i] : x[i + 4], 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool up = threadIdx.x & 8;
    y[i] = (up ? y[i + 2] : y[i]) + __shfl_xor_sync(kFull, up ? y[i] : y[i + 2], 8);
  }
  const bool up = threadIdx.x & 4;
  return (up ? y[1] : y[0]) + __shfl_xor_sync(kFull, up ? y[0] : y[1], 4);
}

// The same over all lanes.
template <class Number>
__device__ __forceinline__ Number add_over_lanes(const Number (&x)[8]) {
  Number y = add_over_quads(x);
  y += __shfl_xor_sync(kFull, y, 2);
  return y + __shfl_xor_sync(kFull, y, 1);
}

// The least or greatest over lanes of the 8 channels in 4 registers, for channel lane / 4.
template <class Combine>
__device__ __forceinline__ float extreme_over_lanes(const uint32_t (&x)[4], Combine combine) {
  uint32_t y[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool up = threadIdx.x & 16;
    y[i] = combine(up ? x[i + 2] : x[i], __shfl_xor_sync(kFull, up ? x[i] : x[i + 2], 16));
  }
  const bool up = threadIdx.x & 8;
  uint32_t z = combine(up ? y[1] : y[0], __shfl_xor_sync(kFull, up ? y[0] : y[1], 8));
#pragma unroll
  for (int o = 4; o; o >>= 1) z = combine(z, __shfl_xor_sync(kFull, z, o));
  return __half2float(__ushort_as_half(static_cast<unsigned short>(threadIdx.x & 4 ? z >> 16 : z & 0xffff)));
}

struct LeastPair {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return as_bits(__hmin2(as_half2(a), as_half2(b))); }
};
struct MostPair {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return as_bits(__hmax2(as_half2(a), as_half2(b))); }
};

// FP16 numbers that lane 4c + `from` holds for channel c, as pairs.
__device__ __forceinline__ void share_pairs(uint32_t (&pairs)[4], __half mine, int from) {
  const uint32_t bits = __half_as_ushort(mine), other = __shfl_xor_sync(kFull, bits, 4);
  const uint32_t pair = threadIdx.x & 4 ? other | bits << 16 : bits | other << 16;
#pragma unroll
  for (int j = 0; j < 4; ++j) pairs[j] = __shfl_sync(kFull, pair, 8 * j + from);
}

__device__ __forceinline__ void share(float (&all)[8], float mine) {
#pragma unroll
  for (int c = 0; c < 8; ++c) all[c] = __shfl_sync(kFull, mine, 4 * c);
}

// Which lanes' low and high halves are above the threshold's.
__device__ __forceinline__ void ballots_above(uint32_t x, uint32_t threshold, uint32_t* low, uint32_t* high) {
  asm("{.reg .pred p, q;\n setp.gt.f16x2 p|q, %2, %3;\n vote.sync.ballot.b32 %0, p, -1;\n vote.sync.ballot.b32 %1, q, -1;}"
      : "=r"(*low), "=r"(*high)
      : "r"(x), "r"(threshold));
}

// Where shared memory holds 8 channels of a token, `warp` of the block's 4 times 8: so that warps read and write without bank conflicts.
__device__ __forceinline__ int place_of(int token, int warp) { return token * kQuantizeWarps + (warp ^ (token >> 1 & 3)); }

// 8 channels of a group, less a pivot; all but `x`, `tiles`, `count` and `copies` is that of channel lane / 4.
template <int kSteps>
struct Channels {
  uint32_t x[kSteps][4];
  int tiles, count, copies;
  float copy;   // the last token, which fills the last tile
  float pivot;  // number = unit * (x + pivot)
  float unit;
  float sum, low, high;  // of the tokens

  // Calls visit(step) for the steps in use.
  template <class Visit>
  __device__ __forceinline__ void each_step(Visit visit) const {
#pragma unroll
    for (int tile = 0; tile < kSteps / 4; ++tile) {
      if (tile >= tiles) break;
#pragma unroll
      for (int s = 0; s < 4; ++s) visit(4 * tile + s);
    }
  }

  // Adds over the tokens of a quad of lanes what number(step, pair, numbers) gives, kMany pairs of FP16 numbers: for all 8 channels.
  template <int kMany, class Number>
  __device__ __forceinline__ void add(float (&found)[kMany][8], Number number) const {
    uint32_t ones[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ones[i] = threadIdx.x & 4 ? 0x3c000000u : 0x00003c00u;
      asm volatile("" : "+r"(ones[i]));  // two registers side by side, or each product would begin by copying one
    }
    float sums[kMany][2][4] = {};
#pragma unroll
    for (int tile = 0; tile < kSteps / 4; ++tile) {
      if (tile >= tiles) break;
#pragma unroll
      for (int s = 4 * tile; s < 4 * tile + 4; s += 2)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t numbers[4][kMany];
#pragma unroll
          for (int k = 0; k < 4; ++k) number(s + k / 2, 2 * h + k % 2, numbers[k]);
#pragma unroll
          for (int n = 0; n < kMany; ++n) mma_half(sums[n][h], numbers[0][n], numbers[1][n], numbers[2][n], numbers[3][n], ones[0], ones[1]);
        }
    }
#pragma unroll
    for (int n = 0; n < kMany; ++n)
#pragma unroll
      for (int c = 0; c < 8; ++c) found[n][c] = sums[n][c / 4][c % 4];
  }

  __device__ __forceinline__ float n() const { return static_cast<float>(count); }
  __device__ __forceinline__ float mean() const { return sum / n(); }
  __device__ __forceinline__ void find_sum() {
    float found[1][8];
    add(found, [&](int s, int j, uint32_t (&numbers)[1]) { numbers[0] = x[s][j]; });
    sum = add_over_quads(found[0]) - static_cast<float>(copies) * copy;
  }

  // Reads the tokens, by all warps of the block, into `staged` [group_size][4] and x; false if there is nothing to store or no room.
  __device__ __forceinline__ bool load(const VkvxParams& p, bool is_key, int b, int head, int g, int first_channel, uint4* staged, int* group) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, slot = p.slot[b], groups = p.visual_capacity / p.group_size;
    if (slot < 0) return false;
    const int* index = p.visual_index + static_cast<int64_t>(b) * p.visual_entries + static_cast<int64_t>(g) * p.group_size;
    int at[kSteps], valid = 0, last = 0, filled = 0;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      at[s] = 32 * s + lane < p.group_size ? index[32 * s + lane] : -1;
      valid += at[s] >= 0;
      last = max(last, at[s]);
    }
    for (int i = lane; i < groups; i += 32) filled += p.visual_count[static_cast<int64_t>(slot) * groups + i] > 0;
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
    const uint16_t* source = static_cast<const uint16_t*>(is_key ? p.key : p.value) + b * stride[0] + head * stride[1] + first_channel;
    each_step([&](int s) {
      const int token = 32 * s + 8 * warp + lane / 4, position = __shfl_sync(kFull, at[s], 8 * warp + lane / 4);
      const uint16_t* from = source + (position < 0 ? last : position) * stride[2] + 8 * (lane % 4);
      copy_async(shared_address(staged + place_of(token, lane % 4)), from);
    });
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    each_step([&](int s) {
      const uint4 v = staged[place_of(32 * s + lane, warp)];
      x[s][0] = v.x, x[s][1] = v.y, x[s][2] = v.z, x[s][3] = v.w;
    });
    unit = 1.0f;
    const bool bfloat = p.dtype == VKVX_BFLOAT16;
    if (bfloat) from_bfloat();
    const bool changed = find_sum_of_raw(source + static_cast<int64_t>(last) * stride[2] + 8 * warp, bfloat);
    if (changed || bfloat)
      each_step([&](int s) { staged[place_of(32 * s + lane, warp)] = make_uint4(x[s][0], x[s][1], x[s][2], x[s][3]); });
    return true;
  }

  // BF16 to FP16 by the power of two that puts the greatest magnitude of each channel below 2^15, rounding only what is 2^-30 of it.
  __device__ __forceinline__ void from_bfloat() {
    float most[8] = {};
    auto numbers = [&](uint32_t bits) { return make_float2(clean(__uint_as_float(bits << 16)), clean(__uint_as_float(bits & 0xffff0000u))); };
    each_step([&](int s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 v = numbers(x[s][j]);
        most[2 * j] = fmaxf(most[2 * j], fabsf(v.x));
        most[2 * j + 1] = fmaxf(most[2 * j + 1], fabsf(v.y));
      }
    });
    float factor[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int exponent = ilogbf(fmaxf(warp_max(most[c]), 1e-30f));
      factor[c] = ldexpf(1.0f, 14 - exponent);
    }
    each_step([&](int s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 v = numbers(x[s][j]);
        x[s][j] = pack_half2(v.x * factor[2 * j], v.y * factor[2 * j + 1]);
      }
    });
    float mine = factor[0];
#pragma unroll
    for (int c = 1; c < 8; ++c) mine = static_cast<int>(threadIdx.x & 31) / 4 == c ? factor[c] : mine;
    unit = 1.0f / mine;
  }

  // Cleans the numbers if some are none, then finds sum, extremes and pivot; whether x has changed.
  __device__ __forceinline__ bool find_sum_of_raw(const uint16_t* last_token, bool bfloat) {
    const uint16_t bits = last_token[(threadIdx.x & 31) / 4];
    copy = clean(bfloat ? __uint_as_float(static_cast<uint32_t>(bits) << 16) : __half2float(__ushort_as_half(bits))) / unit;
    pivot = 0.0f;
    find_sum();
    const bool dirty = !__all_sync(kFull, isfinite(sum));
    if (dirty) {
      each_step([&](int s) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 v = __half22float2(as_half2(x[s][j]));
          x[s][j] = pack_half2(clean(v.x), clean(v.y));
        }
      });
      find_sum();
    }
    uint32_t least[4], most[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) least[j] = most[j] = x[0][j];
    each_step([&](int s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        least[j] = LeastPair()(least[j], x[s][j]);
        most[j] = MostPair()(most[j], x[s][j]);
      }
    });
    low = extreme_over_lanes(least, LeastPair());
    high = extreme_over_lanes(most, MostPair());
    // Where all numbers lie within a factor of 2, differences from the least are exact, and sums lose nothing to what they share.
    const bool near = (low > 0.0f && high <= 2.0f * low) || (high < 0.0f && low >= 2.0f * high);
    if (!__any_sync(kFull, near)) return dirty;
    pivot = near ? low : 0.0f;
    uint32_t pivots[4];
    share_pairs(pivots, __float2half_rn(pivot), 0);
    each_step([&](int s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[s][j] = as_bits(__hsub2(as_half2(x[s][j]), as_half2(pivots[j])));
    });
    copy -= pivot;
    low -= pivot;
    high -= pivot;
    find_sum();
    return true;
  }

  // 1.0 where a number is above the threshold, else 0.
  __device__ __forceinline__ uint32_t above(int s, int j, const uint32_t (&threshold)[4]) const {
    return as_bits(__hgt2(as_half2(x[s][j]), as_half2(threshold[j])));
  }

  // What the copies of the last token add to a count above the threshold.
  __device__ __forceinline__ float copies_above(float threshold) const { return copy > threshold ? static_cast<float>(copies) : 0.0f; }

  // Quantiles `alpha` and 1 - `alpha`. Lanes 0 and 1 of a quad search the lower, 2 and 3 the upper: a number so that as many tokens are
  // at or below it as the rank says, by secants from a guess, and bisection where that is slow.
  __device__ __forceinline__ void find_quantiles(float alpha, const uint4* staged, float* lower, float* upper) const {
    const bool is_upper = threadIdx.x & 2;
    const float q = is_upper ? static_cast<float>(1.0 - static_cast<double>(alpha)) : alpha, position = q * (n() - 1.0f);
    const float rank = floorf(position), wanted = rank + 1.0f;
    // A bell of the tokens' mean distance from their mean, and the normal quantile to 2 digits.
    uint32_t means[4];
    share_pairs(means, __float2half_rn(mean()), 0);
    float distances[1][8];
    add(distances, [&](int s, int j, uint32_t (&numbers)[1]) { numbers[0] = as_bits(__habs2(__hsub2(as_half2(x[s][j]), as_half2(means[j])))); });
    const float spread = fmaxf(1.2533f * add_over_quads(distances[0]) / static_cast<float>(tiles * kTile), 1e-7f), z = 4.91f * (__powf(q, 0.14f) - __powf(1.0f - q, 0.14f));
    float slope = 0.4f * n() * __expf(-0.5f * z * z) / spread, next = fmaf(z, spread, mean());
    int a = order_of_half(low) - 1, b = order_of_half(high);  // at or below a are `under` <= rank tokens, at or below b `over` > rank
    float under = 0.0f, over = n(), last = 0.0f, last_found = -1.0f;
    for (int pass = 0;; ++pass) {
      const bool done = over == wanted || b - a <= 1;
      if (__all_sync(kFull, done)) break;
      int probe = order_of_half(fminf(fmaxf(next, half_of_order(a)), half_of_order(b)));
      if (pass >= 8 && pass % 2) probe = (a + b) >> 1;
      probe = done ? b : min(max(probe, a + 1), b - 1);
      const float mine = half_of_order(probe);
      uint32_t thresholds[2][4];
      share_pairs(thresholds[0], __float2half_rn(mine), 0);
      share_pairs(thresholds[1], __float2half_rn(mine), 2);
      float counts[2][8];
      add(counts, [&](int s, int j, uint32_t (&numbers)[2]) {
        numbers[0] = above(s, j, thresholds[0]);
        numbers[1] = above(s, j, thresholds[1]);
      });
      // Both in one number, so that lanes are added up once.
      constexpr float kFactor = 2048.0f;
#pragma unroll
      for (int c = 0; c < 8; ++c) counts[0][c] = fmaf(counts[1][c], kFactor, counts[0][c]);
      const float both = add_over_quads(counts[0]), second = floorf(both / kFactor), first = both - second * kFactor;
      const float found = n() - ((is_upper ? second : first) - copies_above(mine));
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
      if (!(next > from && next < to)) next = from + (to - from) * __fdividef(wanted - under, over - under);
    }
    // The tokens on either side of b.
    const float end = half_of_order(b);
    uint32_t thresholds[2][4], below[2][4], beyond[2][4];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      share_pairs(thresholds[side], __float2half_rn(end), 2 * side);
#pragma unroll
      for (int j = 0; j < 4; ++j) below[side][j] = 0xfc00fc00u, beyond[side][j] = 0x7c007c00u;
    }
#pragma unroll 2
    for (int t = threadIdx.x & 31; t < kTile * tiles; t += 32) {
      const uint4 v = staged[place_of(t, threadIdx.x >> 5)];
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t mask = __hgt2_mask(as_half2(pairs[j]), as_half2(thresholds[side][j]));
          below[side][j] = MostPair()(below[side][j], (pairs[j] & ~mask) | (0xfc00fc00u & mask));
          beyond[side][j] = LeastPair()(beyond[side][j], (pairs[j] & mask) | (0x7c007c00u & ~mask));
        }
    }
    const float here[2] = {extreme_over_lanes(below[0], MostPair()), extreme_over_lanes(below[1], MostPair())};
    const float above_it[2] = {extreme_over_lanes(beyond[0], LeastPair()), extreme_over_lanes(beyond[1], LeastPair())};
    const float at = is_upper ? here[1] : here[0], next_one = is_upper ? above_it[1] : above_it[0];
    const float after = over > wanted || wanted >= n() ? at : next_one;
    const float mine = at + (after - at) * (position - rank), others = __shfl_xor_sync(kFull, mine, 2);
    *lower = is_upper ? others : mine;
    *upper = is_upper ? mine : others;
  }

  // Lloyd's algorithm for two levels.
  __device__ __forceinline__ void find_two_levels(float* lower, float* upper) const {
    float threshold = mean(), before = INFINITY;
    for (int round = 0; round < kLloydIterations; ++round) {
      const float mine = __half2float(__float2half_rd(threshold));  // no FP16 number lies between the two
      if (__all_sync(kFull, mine == before)) break;
      before = mine;
      uint32_t thresholds[4];
      share_pairs(thresholds, __float2half_rn(mine), 0);
      float found[2][8];
      add(found, [&](int s, int j, uint32_t (&numbers)[2]) {
        numbers[0] = above(s, j, thresholds);
        numbers[1] = as_bits(__hmul2(as_half2(x[s][j]), as_half2(numbers[0])));
      });
      const float many = add_over_quads(found[0]) - copies_above(mine), above_it = add_over_quads(found[1]) - copies_above(mine) * copy;
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
    float means[8];
    share(means, middle);
    *lower -= middle;
    for (int round = 0; round < kLloydIterations; ++round) {
      const float slope = 1.0f / ((*step > 0.0f ? *step : 1.0f) * top), shift = -*lower * slope;
      float codes[8] = {}, squares[8] = {}, products[8] = {}, slopes[8], shifts[8];
      share(slopes, slope);
      share(shifts, shift);
      auto code_of = [&](float u, float by, float plus) { return fmaf(__saturatef(fmaf(u, by, plus)), top, kMagic) - kMagic; };
      each_step([&](int s) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          uint32_t bits = x[s][c / 2];
          asm volatile("" : "+r"(bits));  // or the compiler would convert all numbers before the first round, and spill them
          const float2 pair = __half22float2(as_half2(bits));
          const float u = (c % 2 ? pair.y : pair.x) - means[c], code = code_of(u, slopes[c], shifts[c]);
          codes[c] += code;
          squares[c] = fmaf(code, code, squares[c]);
          products[c] = fmaf(code, u, products[c]);
        }
      });
      int whole_codes[8], whole_squares[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) whole_codes[c] = static_cast<int>(codes[c]), whole_squares[c] = static_cast<int>(squares[c]);
      const float u = copy - middle, code = code_of(u, slope, shift);
      const int whole = static_cast<int>(code);
      const int64_t all = add_over_lanes(whole_codes) - copies * whole, all_squares = add_over_lanes(whole_squares) - copies * whole * whole;
      const float product = add_over_lanes(products) - static_cast<float>(copies) * code * u;
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
