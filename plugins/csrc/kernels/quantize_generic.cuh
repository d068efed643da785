// Levels and codes, the path that takes everything: groups of any size, type and alignment, any
// architecture; of `shaped` the levels alone. `quantize` in append.cu chooses it where
// quantize_registers.cuh does not do.
//
// A block takes 32 channels of one group, so that a warp's lanes are 32 neighbouring channels (one
// word of a key) and its warps share the group's tokens. Values are read once and kept in shared
// memory as floats [token][channel], if they fit. Statistics of a channel are combined over warps
// in a fixed order. docs/format.md, "Quantisers", is the specification. Divisions are true
// divisions and sums FP32, as in the reference.
#pragma once

#include "shape_workspace.cuh"

namespace vkvx {

constexpr int kAppendWarps = 16;
constexpr int kChannels = 32;

struct FoundLevels {
  float scale, offset;
};

// Sum, or least or greatest, over the warps of the block for each lane; `scratch` holds 3 *
// kAppendWarps * 32 floats.
template <class Combine>
__device__ __forceinline__ float over_warps(float x, float* scratch, Combine combine) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  __syncthreads();
  scratch[warp * 32 + lane] = x;
  __syncthreads();
  float y = scratch[lane];
#pragma unroll
  for (int w = 1; w < kAppendWarps; ++w) y = combine(y, scratch[w * 32 + lane]);
  return y;
}

// Three sums at once.
__device__ __forceinline__ void add_over_warps(float (&x)[3], float* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 3; ++k) scratch[(k * kAppendWarps + warp) * 32 + lane] = x[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    x[k] = scratch[k * kAppendWarps * 32 + lane];
#pragma unroll
    for (int w = 1; w < kAppendWarps; ++w) x[k] += scratch[(k * kAppendWarps + w) * 32 + lane];
  }
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Least {
  __device__ float operator()(float a, float b) const { return fminf(a, b); }
};
struct Most {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// A float as an integer of the same order.
__device__ __forceinline__ uint32_t order_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(uint32_t order) {
  return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// Order statistic number `rank` (0 is the least) of a channel's count values, and the next one, by
// bisection of the bits: exact.
template <class Value>
__device__ float2 order_statistics(Value value, int count, int rank, float* scratch) {
  const int warp = threadIdx.x >> 5;
  uint32_t found = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t middle = found | 1u << bit;
    float below = 0.0f;
    for (int i = warp; i < count; i += kAppendWarps)
      below += order_of(value(i)) < middle ? 1.0f : 0.0f;
    if (over_warps(below, scratch, Add()) <= static_cast<float>(rank)) found = middle;
  }
  const float here = value_of(found);
  float up_to = 0.0f, next = INFINITY;
  for (int i = warp; i < count; i += kAppendWarps) {
    const float x = value(i);
    if (order_of(x) <= found)
      up_to += 1.0f;
    else
      next = fminf(next, x);
  }
  up_to = over_warps(up_to, scratch, Add());
  next = over_warps(next, scratch, Least());
  return make_float2(here, up_to > static_cast<float>(rank + 1) ? here : next);
}

template <class Value>
__device__ float quantile(Value value, int count, float position, float* scratch) {
  const float below = floorf(position);
  const float2 x = order_statistics(value, count, static_cast<int>(below), scratch);
  const float above = below + 1.0f < static_cast<float>(count) ? x.y : x.x;
  return x.x + (above - x.x) * (position - below);
}

// Levels of the lane's channel; value(i) is token i's value less the mean. `distance`: of the
// levels of `shaped`, in deviations.
template <class Value>
__device__ FoundLevels find_levels(Value value, int count, float mean, int quantizer, int bits,
                                   float alpha, float gamma, float distance, float* scratch) {
  const int warp = threadIdx.x >> 5;
  const float n = static_cast<float>(count), top = static_cast<float>((1 << bits) - 1);
  float low = INFINITY, high = -INFINITY;
  for (int i = warp; i < count; i += kAppendWarps) {
    low = fminf(low, value(i));
    high = fmaxf(high, value(i));
  }
  low = over_warps(low, scratch, Least());
  high = over_warps(high, scratch, Most());
  const bool varies = high > low;
  float scale = (high - low) / top;
  if (quantizer == VKVX_QUANTILE) {
    const float last = n - 1.0f;
    const float first = quantile(value, count, alpha * last, scratch);
    high = quantile(value, count, static_cast<float>(1.0 - static_cast<double>(alpha)) * last,
                    scratch);
    low = first;
    scale = (high - low) / top;
  } else if (quantizer == VKVX_SHRINK) {
    low = gamma * (low + mean) - mean;
    high = gamma * (high + mean) - mean;
    scale = (high - low) / top;
  } else if (quantizer == VKVX_SHAPED) {
    float squares = 0.0f;
    for (int i = warp; i < count; i += kAppendWarps) squares = fmaf(value(i), value(i), squares);
    squares = over_warps(squares, scratch, Add());
    shaped_levels(distance * sqrtf(squares / n), 0.0f, high, bits, &low, &scale);
  } else if (quantizer == VKVX_LLOYD && bits == 1) {
    float threshold = 0.0f;
    for (int round = 0; round < kLloydIterations; ++round) {
      float sums[3] = {};  // above the threshold, at or below it, how many are above
#pragma unroll 8
      for (int i = warp; i < count; i += kAppendWarps) {
        const float x = value(i);
        const bool up = x > threshold;
        sums[0] += up ? x : 0.0f;
        sums[1] += up ? 0.0f : x;
        sums[2] += up ? 1.0f : 0.0f;
      }
      add_over_warps(sums, scratch);
      high = sums[2] > 0.0f ? sums[0] / sums[2] : threshold;
      low = sums[2] < n ? sums[1] / (n - sums[2]) : threshold;
      threshold = (low + high) / 2.0f;
    }
    scale = high - low;
  } else if (quantizer == VKVX_LLOYD) {
    float average = 0.0f;  // what subtracting the rounded mean leaves of it
    for (int i = warp; i < count; i += kAppendWarps) average += value(i);
    average = over_warps(average, scratch, Add()) / n;
    for (int round = 0; round < kLloydIterations; ++round) {
      const float step = scale > 0.0f ? scale : 1.0f;
      auto code = [&](int i) { return fminf(fmaxf(rintf((value(i) - low) / step), 0.0f), top); };
      float codes = 0.0f;
      for (int i = warp; i < count; i += kAppendWarps) codes += code(i);
      const float middle = over_warps(codes, scratch, Add()) / n;
      float variance = 0.0f, covariance = 0.0f;
      for (int i = warp; i < count; i += kAppendWarps) {
        const float spread = code(i) - middle;
        variance = fmaf(spread, spread, variance);
        covariance = fmaf(spread, value(i), covariance);
      }
      variance = over_warps(variance, scratch, Add()) / n;
      covariance = over_warps(covariance, scratch, Add()) / n;
      if (variance > 0.0f) {
        scale = covariance / variance;
        low = average - scale * middle;
      }
    }
  }
  const float rounded =
      __half2float(__float2half_rn(varies ? fminf(fmaxf(scale, 0.0f), kHalfMax) : 0.0f));
  const float offset = fminf(fmaxf(rounded > 0.0f ? low + mean : mean, -kHalfMax), kHalfMax);
  return FoundLevels{rounded, __half2float(__float2half_rn(offset))};
}

// Grid: (2 * call groups * D / 32, Hkv, B): x runs over keys, then values. Dynamic shared memory:
// the group's values if `cached`.
__global__ void __launch_bounds__(kAppendWarps * 32)
    quantize_generic_kernel(const __grid_constant__ VkvxParams p, ShapeWorkspace w, bool cached) {
  extern __shared__ float numbers[];  // [group_size][32]
  __shared__ float scratch[3 * kAppendWarps * 32];
  __shared__ int found[2];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, D = p.head_dim, words = D / 32;
  const int call_groups = p.visual_entries / p.group_size;
  const bool is_key = blockIdx.x < call_groups * words;
  const int part = is_key ? blockIdx.x : blockIdx.x - call_groups * words;
  const int g = part / words, word = part % words, head = blockIdx.y, b = blockIdx.z;
  // The levels of `shaped` wait for the metrics later; what is ahead of these has ended.
  if (p.quantizer != VKVX_SHAPED) wait_for_earlier_kernels();
  int group, count;
  if (!place_group(p, b, g, &group, &count, found)) return;
  const int bits = is_key ? p.key_bits : p.value_bits;
  const void* source = is_key ? p.key : p.value;
  const int64_t* stride = is_key ? p.key_stride : p.value_stride;
  const int64_t base = b * stride[0] + head * stride[1] + 32 * word + lane;
  const int* index = p.visual_index + static_cast<int64_t>(b) * p.visual_entries +
                     static_cast<int64_t>(g) * p.group_size;
  // Several loads at a time, or each would wait for the one before.
  constexpr int kBatch = 16;
  float sum = 0.0f;
  for (int first = warp; first < count; first += kBatch * kAppendWarps) {
    int at[kBatch];
    uint32_t bits[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) at[n] = index[min(first + n * kAppendWarps, count - 1)];
    if (p.dtype == VKVX_FLOAT32) {
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
        bits[n] = static_cast<const uint32_t*>(source)[base + at[n] * stride[2]];
    } else {
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
        bits[n] = static_cast<const uint16_t*>(source)[base + at[n] * stride[2]];
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int i = first + n * kAppendWarps;
      if (i >= count) break;
      const float x = clean(p.dtype == VKVX_FLOAT16    ? __half2float(__ushort_as_half(bits[n]))
                            : p.dtype == VKVX_BFLOAT16 ? __uint_as_float(bits[n] << 16)
                                                       : __uint_as_float(bits[n]));
      if (cached) numbers[i * kChannels + lane] = x;
      sum += x;
    }
  }
  const float mean = over_warps(sum, scratch, Add()) / static_cast<float>(count);
  // Groups that shared memory cannot hold are read again.
  auto raw = [&](int i) {
    return cached ? numbers[i * kChannels + lane]
                  : clean(load_float(source, base + index[i] * stride[2], p.dtype));
  };
  auto value = [&](int i) { return raw(i) - mean; };
  float distance = 0.0f;
  if (p.quantizer == VKVX_SHAPED) {
    wait_for_earlier_kernels();
    distance = level_distance(p, w, is_key, b, head);
  }
  const FoundLevels levels = find_levels(value, count, mean, p.quantizer, bits,
                                         is_key ? p.quantile_alpha_key : p.quantile_alpha_value,
                                         is_key ? p.shrink_key : p.shrink_value, distance, scratch);
  const float top = static_cast<float>((1 << bits) - 1);
  auto code = [&](float x) {
    if (!(levels.scale > 0.0f)) return 0u;
    return static_cast<uint32_t>(
        fminf(fmaxf(rintf((x - levels.offset) / levels.scale), 0.0f), top));
  };
  const int64_t slot_head = static_cast<int64_t>(p.slot[b]) * p.kv_heads + head,
                groups = p.visual_capacity / p.group_size;
  const int64_t first_tile = slot_head * (p.visual_capacity / kTile) +
                             static_cast<int64_t>(group) * (p.group_size / kTile);
  if (p.quantizer == VKVX_SHAPED) {  // shape.cuh chooses the codes
    if (warp == 0) {
      __half* out = static_cast<__half*>(is_key ? p.visual_key_params : p.visual_value_params) +
                    (slot_head * groups + group) * (is_key ? 3 : 2) * D + 32 * word + lane;
      out[0] = __float2half_rn(levels.scale);
      out[D] = __float2half_rn(levels.offset);
    }
  } else if (is_key) {
    float squares = 0.0f;
    for (int i = warp; i < p.group_size; i += kAppendWarps) {
      uint32_t c = 0;
      if (i < count) {
        const float x = raw(i);
        c = code(x);
        const float residual = x - (levels.offset + levels.scale * static_cast<float>(c));
        squares = fmaf(residual, residual, squares);
      }
      int* out =
          p.visual_key + ((first_tile + i / kTile) * bits * kTile + i % kTile) * words + word;
      for (int plane = 0; plane < bits; ++plane) {
        const uint32_t packed = __ballot_sync(kFull, c >> plane & 1);
        if (lane == plane)
          out[static_cast<int64_t>(plane) * kTile * words] = static_cast<int>(packed);
      }
    }
    squares = over_warps(squares, scratch, Add());
    if (warp == 0) {
      __half* out = static_cast<__half*>(p.visual_key_params) +
                    (slot_head * groups + group) * 3 * D + 32 * word + lane;
      out[0] = __float2half_rn(levels.scale);
      out[D] = __float2half_rn(levels.offset);
      out[2 * D] = __float2half_rn(fminf(sqrtf(squares / static_cast<float>(count)), kHalfMax));
    }
  } else {
    // A lane packs 32 tokens of its channel.
    for (int first = warp * 32; first < p.group_size; first += kAppendWarps * 32) {
      uint32_t packed[8] = {};
      for (int i = 0; i < 32 && first + i < count; ++i) {
        const uint32_t c = code(raw(first + i));
#pragma unroll
        for (int plane = 0; plane < 8; ++plane) packed[plane] |= (c >> plane & 1) << i;
      }
      int* out = p.visual_value + ((first_tile + first / kTile) * bits * D + 32 * word + lane) * 4 +
                 first % kTile / 32;
#pragma unroll
      for (int plane = 0; plane < 8; ++plane)
        if (plane < bits)
          out[static_cast<int64_t>(plane) * D * 4] = static_cast<int>(packed[plane]);
    }
    if (warp == 0) {
      __half* out = static_cast<__half*>(p.visual_value_params) +
                    (slot_head * groups + group) * 2 * D + 32 * word + lane;
      out[0] = __float2half_rn(levels.scale);
      out[D] = __float2half_rn(levels.offset);
    }
  }
}

}  // namespace vkvx
