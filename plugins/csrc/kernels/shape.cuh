// Quantiser `shaped`: codes whose errors cancel where attention looks. The levels are stored
// already, so tokens are independent of each other, and so are warps.
//
// A warp takes 32 tokens of a tile of one KV head, keys or values, a lane one. It goes through the
// channels in sets of 8: tensor cores multiply M (shape_metric.cuh) with the errors of all
// channels, in FP16; then each lane chooses the codes of a token's 8 channels, one after the other.
// docs/format.md, "shaped", is the specification.
#pragma once

#include "shape_errors.cuh"

namespace vkvx {

constexpr int kShapeWarps = kTile / 32;  // warps of a block, at most

// Levels of a block's channels in units of a power of two that makes the largest step 1 to 2, so
// that errors are FP16 numbers whatever the size of the tokens; and the diagonal of the metric.
struct ShapeLevels {
  float *low, *step, *inverse, *diagonal;  // [D]; inverse: 1 / (step * largest code), or 0

  __device__ __forceinline__ ShapeLevels(float* at, int head_dim)
      : low(at), step(at + head_dim), inverse(at + 2 * head_dim), diagonal(at + 3 * head_dim) {}
};

// Bytes of shared memory of a block.
template <class Errors>
inline int shape_shared(int head_dim, int warps) {
  const int matrix = Errors::kMatrixInSharedMemory ? 2 * head_dim : 0;
  const int exchange = static_cast<int>(sizeof(ShapeExchange));
  return head_dim * (4 * 4 + 4 * kSet + matrix) + warps * (exchange + Errors::kBytes * head_dim);
}

// One lane's token, 8 channels at a time; kAligned: numbers of 16 bits at multiples of 16 bytes.
template <bool kAligned>
struct ShapeToken {
  const void* source;
  int64_t base;  // its first element
  int dtype;

  __device__ __forceinline__ uint4 fetch(int channel) const {
    return kAligned ? *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(source) + base +
                                                      channel)
                    : uint4{};
  }
  // What was fetched, or else is read now.
  __device__ __forceinline__ void numbers(const uint4& fetched, int channel,
                                          float (&x)[kSet]) const {
    const uint32_t two[4] = {fetched.x, fetched.y, fetched.z, fetched.w};
    if (!kAligned) {
#pragma unroll
      for (int c = 0; c < kSet; ++c) x[c] = load_float(source, base + channel + c, dtype);
    } else if (dtype == VKVX_FLOAT16) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(two[n]));
        x[2 * n] = pair.x, x[2 * n + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        x[2 * n] = __uint_as_float(two[n] << 16);
        x[2 * n + 1] = __uint_as_float(two[n] & 0xffff0000u);
      }
    }
  }
};

// 8 numbers in a row of shared memory.
__device__ __forceinline__ void load_eight(const float* at, float (&x)[kSet]) {
#pragma unroll
  for (int c = 0; c < kSet; c += 4) {
    const float4 four = *reinterpret_cast<const float4*>(at + c);
    x[c] = four.x, x[c + 1] = four.y, x[c + 2] = four.z, x[c + 3] = four.w;
  }
}

// What a warp works on. Codes have up to kPlanes bits.
template <class Errors, int kPlanes>
struct ShapeWarp {
  ShapeLevels levels;
  const float* inner;
  const uint4* matrix;
  ShapeExchange* exchange;
  int head_dim;
  float unit, top;
  ShapeToken<Errors::kAligned> token;
  bool live;  // whether the lane has a token
  bool odd;   // whether some lane has none, or numbers that FP16 errors cannot hold

  __device__ __forceinline__ void read(const uint4& fetched, int channel, float (&x)[kSet]) const {
    token.numbers(fetched, channel, x);
    if (!odd) return;
#pragma unroll
    for (int c = 0; c < kSet; ++c) x[c] = live ? clean(x[c]) : 0.0f;
  }
  __device__ __forceinline__ float bounded(float e) const {
    return odd ? (live ? fminf(fmaxf(e, -kHalfMax), kHalfMax) : 0.0f) : e;
  }
  static __device__ __forceinline__ uint4 pack(const float (&e)[kSet]) {
    return make_uint4(pack_half2(e[0], e[1]), pack_half2(e[2], e[3]), pack_half2(e[4], e[5]),
                      pack_half2(e[6], e[7]));
  }

  // Calls visit(channel, set, fetched token) for the sets, and after each four done(pair). Tokens
  // are fetched kAhead sets ahead.
  template <int kAhead, class Visit, class Done>
  __device__ __forceinline__ void each_set(Errors& errors, Visit visit, Done done) const {
    uint4 next[kAhead];
#pragma unroll
    for (int set = 0; set < kAhead; ++set) next[set] = token.fetch(kSet * set);
#pragma unroll 1
    for (int channel = 0; channel < head_dim; channel += 4 * kSet) {
#pragma unroll
      for (int set = 0; set < 4; ++set) {
        const int at = channel + kSet * set;
        const uint4 fetched = next[set % kAhead];
        if (at + kAhead * kSet < head_dim) next[set % kAhead] = token.fetch(at + kAhead * kSet);
        visit(at, set, fetched);
      }
      done(channel / 32);
      errors.turn();
    }
  }

  // The errors of the nearest levels. Returns whether a token has numbers beyond FP16 or that are
  // none.
  __device__ __forceinline__ bool start(Errors& errors) const {
    float most = 0.0f;
    each_set<4>(
        errors,
        [&](int channel, int set, const uint4& fetched) {
          float low[kSet], step[kSet], inverse[kSet], x[kSet], e[kSet];
          load_eight(levels.low + channel, low);
          load_eight(levels.step + channel, step);
          load_eight(levels.inverse + channel, inverse);
          read(fetched, channel, x);
#pragma unroll
          for (int c = 0; c < kSet; ++c) {
            const float y = fmaf(x[c], unit, -low[c]);
            e[c] = bounded(nearest(y, step[c], inverse[c]));
            most = fmaf(x[c], x[c], most);
          }
          errors.replace(set, pack(e), exchange);
        },
        [](int) {});
    return __any_sync(kFull, !(most <= kHalfMax * kHalfMax));
  }

  // What the nearest level leaves of a number.
  __device__ __forceinline__ float nearest(float y, float step, float inverse) const {
    return fmaf(-step, fmaf(__saturatef(y * inverse), top, kMagic) - kMagic, y);
  }

  // The pass over the channels. It packs the codes of the keys or values whose words begin at
  // `out`: that of the lane's token, or that of the warp's tokens in channel 0. It stores the sums
  // of e_c over the warp's tokens, and of keys those of e_c^2.
  __device__ __forceinline__ void sweep(Errors& errors, int bits, bool is_key, int* out,
                                        float* sums) const {
    const int lane = threadIdx.x & 31;
    uint32_t words[kPlanes] = {};
    each_set<1>(
        errors,
        [&](int channel, int set, const uint4& fetched) {
          float pull[kSet], y[kSet], e[kSet], step[kSet], inverse[kSet];
          uint32_t codes[2] = {};
          errors.pull(set, matrix + channel * head_dim / kSet, exchange, pull);
          load_eight(levels.low + channel, e);
          load_eight(levels.step + channel, step);
          load_eight(levels.inverse + channel, inverse);
          read(fetched, channel, y);
#pragma unroll
          for (int c = 0; c < kSet; ++c) y[c] = fmaf(y[c], unit, -e[c]);
#pragma unroll
          for (int c = 0; c < kSet; ++c) {
            float follow[kSet];
            load_eight(inner + (channel + c) * kSet, follow);
            const float code = fmaf(__saturatef((y[c] + pull[c]) * inverse[c]), top, kMagic);
            codes[c / 4] |= (__float_as_uint(code) & 0xff) << 8 * (c % 4);
            e[c] = bounded(fmaf(-step[c], code - kMagic, y[c]));
            const float moved = e[c] - bounded(nearest(y[c], step[c], inverse[c]));
#pragma unroll
            for (int k = c + 1; k < kSet; ++k) pull[k] = fmaf(follow[k], moved, pull[k]);
          }
          errors.replace(set, pack(e), exchange);
          const float total = add_over_lanes(e);
          if (lane % 4 == 0) sums[channel + lane / 4] = total / unit;
          if (is_key) {
#pragma unroll
            for (int c = 0; c < kSet; ++c) e[c] *= e[c];
            const float square = add_over_lanes(e);
            if (lane % 4 == 0) sums[head_dim + channel + lane / 4] = square / (unit * unit);
          }
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            if (plane >= bits) break;
            add_plane(codes, live, plane, set, is_key, &words[plane]);
          }
        },
        [&](int pair) {
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            if (plane >= bits) break;
            out[static_cast<int64_t>(plane) * kTile * (head_dim / 32) +
                (is_key ? pair : (32 * pair + lane) * 4)] = static_cast<int>(words[plane]);
            words[plane] = 0;
          }
        });
  }

  // One bit of each code of a set, to the word of a key's 32 channels, or of 32 tokens in channel
  // lane of the four sets.
  static __device__ __forceinline__ void add_plane(const uint32_t (&codes)[2], bool live, int plane,
                                                   int set, bool is_key, uint32_t* word) {
    if (is_key) {
      auto gather = [&](uint32_t four) {
        return (four >> plane & 0x01010101u) * 0x10204080u >> 28;
      };
      if (live) *word |= (gather(codes[0]) | gather(codes[1]) << 4) << kSet * set;
    } else {
#pragma unroll
      for (int c = 0; c < kSet; ++c) {
        const uint32_t packed =
            __ballot_sync(kFull, live && codes[c / 4] >> (8 * (c % 4) + plane) & 1);
        if ((threadIdx.x & 31) == kSet * set + c) *word = packed;
      }
    }
  }

  // The sum of e . H e over the warp's tokens.
  __device__ __forceinline__ float measure(Errors& errors) const {
    float whole = 0.0f;
#pragma unroll 1
    for (int first = 0; first < head_dim; first += 4 * kSet) {
#pragma unroll
      for (int set = 0; set < 4; ++set) {
        const int channel = first + kSet * set;
        whole += errors.weigh(set, matrix + channel * head_dim / kSet, levels.diagonal + channel,
                              exchange);
      }
      errors.turn();
    }
    return warp_sum(whole) / (unit * unit);
  }
};

// Levels of a group, by all threads of the block; returns units in one.
__device__ __forceinline__ float load_levels(const VkvxParams& p, const __half* params, int bits,
                                             const float* diagonal, const ShapeLevels& levels) {
  const int D = p.head_dim;
  float most = 0.0f;
  for (int c = threadIdx.x & 31; c < D; c += 32) most = fmaxf(most, __half2float(params[c]));
  most = warp_max(most);
  const float unit = most > 0.0f ? ldexpf(1.0f, -ilogbf(most)) : 1.0f,
              top = static_cast<float>((1 << bits) - 1);
  for (int c = threadIdx.x; c < D; c += blockDim.x) {
    const float step = __half2float(params[c]) * unit;
    levels.low[c] = __half2float(params[D + c]) * unit;
    levels.step[c] = step;
    levels.inverse[c] = step > 0.0f ? 1.0f / (step * top) : 0.0f;
    levels.diagonal[c] = diagonal[c];
  }
  return unit;
}

// Grid: (2 * entries of the call / (32 * warps), Hkv, B): x runs over keys, then values. Dynamic
// shared memory: see shape_shared.
template <class Errors, int kPlanes>
__global__ void __launch_bounds__(kShapeWarps * 32, kPlanes == 1 ? 4 : 3)
    shape_kernel(const __grid_constant__ VkvxParams p, ShapeWorkspace w) {
  extern __shared__ uint4 memory[];
  __shared__ int found[2];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5,
            D = p.head_dim, parts = p.visual_entries / (32 * warps);
  const bool is_key = blockIdx.x < parts;
  const int head = blockIdx.y, b = blockIdx.z,
            part = warps * (is_key ? blockIdx.x : blockIdx.x - parts) + warp,
            g = 32 * part / p.group_size, entry = 32 * part % p.group_size;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  int group, count;
  if (!place_group(p, b, g, &group, &count, found)) return;
  const int bits = is_key ? p.key_bits : p.value_bits;
  const int64_t slot_head = static_cast<int64_t>(p.slot[b]) * p.kv_heads + head,
                groups = p.visual_capacity / p.group_size,
                number = metric_number(p, is_key, b, head);
  const __half* params =
      static_cast<const __half*>(is_key ? p.visual_key_params : p.visual_value_params) +
      (slot_head * groups + group) * (is_key ? 3 : 2) * D;
  ShapeExchange* exchanges = reinterpret_cast<ShapeExchange*>(memory);
  float* numbers = reinterpret_cast<float*>(exchanges + warps);
  const ShapeLevels levels(numbers, D);
  float* inner = numbers + 4 * D;
  uint4* rest = reinterpret_cast<uint4*>(inner + D * kSet);
  const float unit = load_levels(p, params, bits, w.diagonal + number * D, levels);
  for (int i = threadIdx.x; i < D * kSet / 4; i += blockDim.x)
    reinterpret_cast<float4*>(inner)[i] =
        reinterpret_cast<const float4*>(w.inner + number * D * kSet)[i];
  const uint4* matrix = reinterpret_cast<const uint4*>(w.matrix + number * D * D);
  if (Errors::kMatrixInSharedMemory) {
#pragma unroll 8
    for (int i = threadIdx.x; i < D * D / 8; i += blockDim.x) rest[i] = matrix[i];
    matrix = rest;
    rest += D * D / 8;
  }
  __syncthreads();

  const int64_t first_tile = slot_head * (p.visual_capacity / kTile) +
                             static_cast<int64_t>(group) * (p.group_size / kTile) + entry / kTile;
  const int within = entry % kTile;
  int* out = is_key ? p.visual_key + (first_tile * bits * kTile + within + lane) * (D / 32)
                    : p.visual_value + first_tile * bits * kTile * (D / 32) + within / 32;
  if (entry >= count) {  // padding
    for (int plane = 0; plane < bits; ++plane, out += kTile * (D / 32))
      for (int i = 0; i < D / 32; ++i) out[is_key ? i : (32 * i + lane) * 4] = 0;
    return;
  }
  const int64_t* stride = is_key ? p.key_stride : p.value_stride;
  const int* index = p.visual_index + static_cast<int64_t>(b) * p.visual_entries +
                     static_cast<int64_t>(g) * p.group_size;
  const int mine = entry + lane;
  ShapeWarp<Errors, kPlanes> shape{levels, inner, matrix, exchanges + warp, D, unit};
  shape.top = static_cast<float>((1 << bits) - 1);
  shape.token = {is_key ? p.key : p.value,
                 b * stride[0] + head * stride[1] + index[min(mine, count - 1)] * stride[2],
                 p.dtype};
  shape.live = mine < count;
  shape.odd = entry + 32 > count;
  Errors errors(p, rest + warp * (Errors::kBytes * D / static_cast<int>(sizeof(uint4))));
  if (shape.start(errors) && !shape.odd) {
    shape.odd = true;
    shape.start(errors);
  }
  float* sums = partial_sums(p, w.partial, is_key, b, head) +
                static_cast<int64_t>(part) * partial_size(p, is_key);
  shape.sweep(errors, bits, is_key, out, sums);
  if (!is_key) return;
  const float whole = shape.measure(errors);
  if (lane == 0) sums[2 * D] = whole;
}

// Moves the offsets so that errors have a mean of 0. Of keys it stores the RMS of each channel's
// errors, times the factor that makes the sum of H_cc rms_c^2 the mean of e . H e. Grid: (2 * call
// groups, Hkv, B): x runs over keys, then values.
__global__ void __launch_bounds__(128)
    shape_finish_kernel(const __grid_constant__ VkvxParams p, ShapeWorkspace w) {
  __shared__ float moves[VKVX_MAX_HEAD_DIM], change[VKVX_MAX_HEAD_DIM], parts[2][4];
  __shared__ int found[2];
  const int D = p.head_dim, call_groups = p.visual_entries / p.group_size, head = blockIdx.y,
            b = blockIdx.z;
  const bool is_key = blockIdx.x < call_groups;
  const int g = is_key ? blockIdx.x : blockIdx.x - call_groups, size = partial_size(p, is_key);
  wait_for_earlier_kernels();
  int group, count;
  if (!place_group(p, b, g, &group, &count, found)) return;
  const float* sums = partial_sums(p, w.partial, is_key, b, head) +
                      static_cast<int64_t>(g) * (p.group_size / 32) * size;
  const int used = static_cast<int>(divide_up(count, 32));
  const float n = static_cast<float>(count);
  auto mean = [&](int i) {
    float sum = 0.0f;
#pragma unroll 8
    for (int k = 0; k < used; ++k) sum += sums[static_cast<int64_t>(k) * size + i];
    return sum / n;
  };
  const int64_t slot_head = static_cast<int64_t>(p.slot[b]) * p.kv_heads + head,
                groups = p.visual_capacity / p.group_size;
  __half* params = static_cast<__half*>(is_key ? p.visual_key_params : p.visual_value_params) +
                   (slot_head * groups + group) * (is_key ? 3 : 2) * D;
  float squares[VKVX_MAX_HEAD_DIM / 128] = {};
#pragma unroll
  for (int i = 0; i < VKVX_MAX_HEAD_DIM / 128; ++i) {
    const int c = threadIdx.x + 128 * i;
    if (c >= D) break;
    const float error = mean(c), offset = __half2float(params[D + c]);
    float move = 0.0f;
    if (__half2float(params[c]) > 0.0f) {
      const __half moved = __float2half_rn(fminf(fmaxf(offset + error, -kHalfMax), kHalfMax));
      params[D + c] = moved;
      move = __half2float(moved) - offset;
    }
    if (is_key) squares[i] = fmaxf(mean(D + c) + move * (move - 2.0f * error), 0.0f);
    moves[c] = move;
    change[c] = move - 2.0f * error;
  }
  if (!is_key) return;
  __syncthreads();
  // The mean of (e - move) . H (e - move) is that of e . H e, plus move . H (move - 2 mean of e).
  const int64_t number = metric_number(p, true, b, head);
  const float* diagonal = w.diagonal + number * D;
  const __half* matrix = w.matrix + number * D * D;
  float apart = 0.0f, more = 0.0f;
#pragma unroll
  for (int i = 0; i < VKVX_MAX_HEAD_DIM / 128; ++i) {
    const int c = threadIdx.x + 128 * i;
    if (c >= D) break;
    float pull = change[c];
#pragma unroll 4
    for (int k = 0; k < D;
         k += 32)  // 16 bytes of M are channels k + q + 0, 1, 8, 9, 16, 17, 24, 25
      for (int q = 0; q < kSet; q += 2) {
        float m[kSet];
        unpack_errors(*reinterpret_cast<const uint4*>(matrix + place_in_matrix(c, k + q, D)), m);
#pragma unroll
        for (int n = 0; n < kSet; ++n) pull = fmaf(m[n], change[k + q + n / 2 * 8 + n % 2], pull);
      }
    apart = fmaf(diagonal[c], squares[i], apart);
    more = fmaf(moves[c] * diagonal[c], pull, more);
  }
  apart = warp_sum(apart);
  more = warp_sum(more);
  if (threadIdx.x % 32 == 0) parts[0][threadIdx.x / 32] = apart, parts[1][threadIdx.x / 32] = more;
  __syncthreads();
  auto all = [&](const float (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); };
  apart = all(parts[0]);
  const float whole = fmaxf(mean(2 * D) + all(parts[1]), 0.0f),
              factor = apart > 0.0f ? whole / apart : 1.0f;
#pragma unroll
  for (int i = 0; i < VKVX_MAX_HEAD_DIM / 128; ++i)
    if (const int c = threadIdx.x + 128 * i; c < D)
      params[2 * D + c] = __float2half_rn(fminf(sqrtf(squares[i] * factor), kHalfMax));
}

}  // namespace vkvx
