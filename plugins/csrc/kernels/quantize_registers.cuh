// Levels and codes, the fast path: groups of up to 1024 FP16 or BF16 tokens whose rows begin at
// multiples of 16 bytes, from compute capability 8.0; of `shaped` the levels alone. `quantize` in
// append.cu chooses it where it can; quantize_generic.cuh takes all else. docs/format.md is the
// specification.
//
// A block reads 64 bytes of a token at a time into shared memory. A warp takes 8 channels of them,
// transposed: a register holds a pair of tokens of channel lane / 4, so that a lane needs the
// threshold of one channel only, and sums over tokens are products with ones on tensor cores. BF16
// becomes FP16, exactly, by a power of two for each channel. What looks at every number once works
// in a short loop, since long code would wait for instructions. The last tile of 128 tokens is
// filled up with copies of the last token until sum and extremes are known, then with the least
// number.
#pragma once

#include "quantize_statistics.cuh"
#include "shape_workspace.cuh"

namespace vkvx {

struct Quantizer {
  int kind, bits;
  float alpha, gamma;
  float distance;  // of levels in deviations
};

// Levels of channel lane / 4, rounded to FP16: of the numbers as they are, and of x.
struct Levels {
  __half scale, offset;
  float step, base;

  template <class X>
  __device__ __forceinline__ Levels(const X& x, const Quantizer& quantizer) {
    const float top = static_cast<float>((1 << quantizer.bits) - 1);
    const bool varies = x.high > x.low;
    float low = x.low, high = x.high;
    if (quantizer.kind == VKVX_QUANTILE) {
      if (quantizer.alpha > 0.0f) x.find_quantiles(quantizer.alpha, &low, &high);
    } else if (quantizer.kind == VKVX_SHRINK) {
      low = quantizer.gamma * (low + x.pivot) - x.pivot;
      high = quantizer.gamma * (high + x.pivot) - x.pivot;
    } else if (quantizer.kind == VKVX_LLOYD && quantizer.bits == 1) {
      x.find_two_levels(&low, &high);
    }
    float size = (high - low) / top;
    if (quantizer.kind == VKVX_LLOYD && quantizer.bits > 1) x.fit_levels(top, &low, &size);
    if (quantizer.kind == VKVX_SHAPED)
      shaped_levels(quantizer.distance * x.deviation(), x.mean(), high, quantizer.bits, &low,
                    &size);
    scale = __float2half_rn(varies ? fminf(fmaxf(size * x.unit, 0.0f), kHalfMax) : 0.0f);
    const float from = (__half2float(scale) > 0.0f ? low : x.mean()) + x.pivot;
    offset = __float2half_rn(fminf(fmaxf(from * x.unit, -kHalfMax), kHalfMax));
    step = __half2float(scale) / x.unit;
    base = __half2float(offset) / x.unit - x.pivot;
  }
};

// Codes of a token's 8 channels, more than one bit.
struct Encoder {
  float bases[8], inverses[8], top;

  __device__ __forceinline__ Encoder(float base, float step, int bits)
      : top(static_cast<float>((1 << bits) - 1)) {
    share(bases, base);
    share(inverses, step > 0.0f ? 1.0f / (step * top) : 0.0f);
  }
  // Its low byte is the code.
  __device__ __forceinline__ float operator()(float x, int c) const {
    return fmaf(__saturatef((x - bases[c]) * inverses[c]), top, kMagic);
  }
};

// Mean square of what the levels leave of channel lane / 4. The codes of a token's 8 channels take
// the place of its numbers in `staged`: byte n holds plane n.
template <class X>
__device__ __forceinline__ float encode_keys(const X& x, const Levels& levels, int bits,
                                             uint4* staged) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float squares[8] = {};
  if (bits == 1) {
    const float half = 0.5f * levels.step, middle = levels.base + half;
    uint32_t thresholds[4];
    share_pairs(thresholds,
                levels.step > 0.0f ? __float2half_rd(middle) : __ushort_as_half(0x7c00));
    float middles[8], halves[8];
    share(middles, middle);
    share(halves, half);
#pragma unroll 2
    for (int t = lane; t < kTile * x.tiles; t += 32) {
      uint4& place = staged[place_of(t, warp)];
      const uint4 v = place;
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
      uint32_t byte = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        byte |= __hgt2_mask(as_half2(pairs[j]), as_half2(thresholds[j])) & (0x00020001u << 2 * j);
      place.x = byte | byte >> 16;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float2 pair = __half22float2(as_half2(pairs[c / 2]));
        const float residual =
            fabsf((c % 2 ? pair.y : pair.x) - middles[c]) - halves[c];  // the nearer level
        if (t < x.count) squares[c] = fmaf(residual, residual, squares[c]);
      }
    }
  } else {
    const Encoder encode(levels.base, levels.step, bits);
    float steps[8];
    share(steps, levels.step);
    for (int t = lane; t < kTile * x.tiles; t += 32) {
      uint4& place = staged[place_of(t, warp)];
      const uint4 v = place;
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
      uint32_t codes[2] = {}, planes[2] = {};
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float2 pair = __half22float2(as_half2(pairs[c / 2]));
        const float number = c % 2 ? pair.y : pair.x, code = encode(number, c);
        codes[c / 4] |= (__float_as_uint(code) & 0xff) << 8 * (c % 4);
        const float residual = number - fmaf(steps[c], code - kMagic, encode.bases[c]);
        if (t < x.count) squares[c] = fmaf(residual, residual, squares[c]);
      }
#pragma unroll
      for (int plane = 0; plane < 8; ++plane) {
        auto gather = [&](uint32_t four) {
          return (four >> plane & 0x01010101u) * 0x10204080u >> 28;
        };
        planes[plane / 4] |= (gather(codes[0]) | gather(codes[1]) << 4) << 8 * (plane % 4);
      }
      place.x = planes[0];
      place.y = planes[1];
    }
  }
  return add_over_lanes(squares) / x.n() * x.unit * x.unit;
}

// Packs along tokens: lane 4c + s holds the word of channel c and step s of a tile. `out` is the
// first tile's word of lane 0.
template <class X>
__device__ __forceinline__ void store_values(const X& x, const Levels& levels, int bits,
                                             int group_tiles, int words, const uint4* staged,
                                             int* out) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  auto store = [&](int tile, int plane, uint32_t word) {
    const int live = x.count - kTile * tile - 32 * (lane & 3);
    if (live < 32) word &= live > 0 ? (1u << live) - 1 : 0;
    out[static_cast<int64_t>(tile * bits + plane) * words + lane] = static_cast<int>(word);
  };
  if (bits == 1) {
    uint32_t thresholds[4];
    share_pairs(thresholds, levels.step > 0.0f ? __float2half_rd(levels.base + 0.5f * levels.step)
                                               : __ushort_as_half(0x7c00));
#pragma unroll 1
    for (int tile = 0; tile < x.tiles; ++tile) {
      uint32_t word = 0;
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint4 v = staged[place_of(kTile * tile + 32 * s + lane, warp)];
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t low, high;
          ballots_above(pairs[j], thresholds[j], &low, &high);
          if (lane == 8 * j + s) word = low;
          if (lane == 8 * j + 4 + s) word = high;
        }
      }
      store(tile, 0, word);
    }
  } else {
    const Encoder encode(levels.base, levels.step, bits);
#pragma unroll 1
    for (int tile = 0; tile < x.tiles; ++tile) {
      uint32_t codes[4][2] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint4 v = staged[place_of(kTile * tile + 32 * s + lane, warp)];
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const float2 pair = __half22float2(as_half2(pairs[c / 2]));
          codes[s][c / 4] |= (__float_as_uint(encode(c % 2 ? pair.y : pair.x, c)) & 0xff)
                             << 8 * (c % 4);
        }
      }
#pragma unroll 1
      for (int plane = 0; plane < bits; ++plane) {
        uint32_t word = 0;
#pragma unroll
        for (int s = 0; s < 4; ++s)
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            const uint32_t packed =
                __ballot_sync(kFull, codes[s][c / 4] >> plane & 1u << 8 * (c % 4));
            if (lane == 4 * c + s) word = packed;
          }
        store(tile, plane, word);
      }
    }
  }
  for (int tile = x.tiles; tile < group_tiles; ++tile)
    for (int plane = 0; plane < bits; ++plane) store(tile, plane, 0);
}

// Grid: (2 * call groups * D / 32, Hkv, B): x runs over keys, then values. Dynamic shared memory:
// 64 bytes per token of a group.
template <int kSteps, int kHeld, int kBlocks>
__global__ void __launch_bounds__(kQuantizeWarps * 32, kBlocks)
    quantize_registers_kernel(const __grid_constant__ VkvxParams p, ShapeWorkspace w) {
  extern __shared__ uint4 staged[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, D = p.head_dim, words = D / 32;
  const int call_groups = p.visual_entries / p.group_size;
  const bool is_key = blockIdx.x < call_groups * words;
  const int part = is_key ? blockIdx.x : blockIdx.x - call_groups * words;
  const int g = part / words, word = part % words, head = blockIdx.y, b = blockIdx.z,
            first_channel = 32 * word + 8 * warp;
  // The levels of `shaped` wait for the metrics later; what is ahead of these has ended.
  if (p.quantizer != VKVX_SHAPED) wait_for_earlier_kernels();
  int group;
  Channels<kSteps, kHeld> x;
  if (!x.load(p, is_key, b, head, g, 32 * word, staged, &group)) return;
  Quantizer quantizer{p.quantizer, is_key ? p.key_bits : p.value_bits,
                      is_key ? p.quantile_alpha_key : p.quantile_alpha_value,
                      is_key ? p.shrink_key : p.shrink_value};
  if (quantizer.kind == VKVX_SHAPED) {
    wait_for_earlier_kernels();
    quantizer.distance = level_distance(p, w, is_key, b, head);
  }
  const int bits = quantizer.bits, group_tiles = p.group_size / kTile;
  const Levels levels(x, quantizer);
  const int64_t slot_head = static_cast<int64_t>(p.slot[b]) * p.kv_heads + head,
                groups = p.visual_capacity / p.group_size;
  const int64_t first_word =
      (slot_head * (p.visual_capacity / kTile) + static_cast<int64_t>(group) * group_tiles) * bits *
      kTile * words;
  const int rows = is_key ? 3 : 2;
  __half* params = static_cast<__half*>(is_key ? p.visual_key_params : p.visual_value_params) +
                   (slot_head * groups + group) * rows * D + first_channel + lane / 4;
  if (lane % 4 == 0) {
    params[0] = levels.scale;
    params[D] = levels.offset;
  }
  if (quantizer.kind == VKVX_SHAPED) return;  // shape.cuh chooses the codes
  if (!is_key) {
    store_values(x, levels, bits, group_tiles, 4 * D, staged,
                 p.visual_value + first_word + 4 * first_channel);
    return;
  }
  const float square = encode_keys(x, levels, bits, staged);
  if (lane % 4 == 0) params[2 * D] = __float2half_rn(fminf(sqrtf(square), kHalfMax));
  __syncthreads();
  int* out = p.visual_key + first_word + word;
  for (int t = threadIdx.x; t < p.group_size; t += kQuantizeWarps * 32) {
    uint32_t planes[2][kQuantizeWarps] = {};
    if (t < x.count)
#pragma unroll
      for (int w = 0; w < kQuantizeWarps; ++w) {
        const uint2 v = *reinterpret_cast<const uint2*>(staged + place_of(t, w));
        planes[0][w] = v.x, planes[1][w] = v.y;
      }
#pragma unroll
    for (int plane = 0; plane < 8; ++plane) {
      if (plane >= bits) break;
      uint32_t packed = 0;
#pragma unroll
      for (int w = 0; w < kQuantizeWarps; ++w)
        packed |= (planes[plane / 4][w] >> 8 * (plane % 4) & 0xff) << 8 * w;
      out[static_cast<int64_t>((t / kTile * bits + plane) * kTile + t % kTile) * words] =
          static_cast<int>(packed);
    }
  }
}

}  // namespace vkvx
