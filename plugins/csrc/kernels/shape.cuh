// Quantiser `shaped`: levels and codes of `lloyd`, which the kernels of quantize_registers.cuh and
// quantize_generic.cuh store, moved by coordinate descent on the sum of e . H e.
//
// A block takes a whole group of one KV head, keys or values. A thread owns up to kTokens tokens:
// their errors e and codes lie in the block's scratch memory [channel][token], H e of kChannels
// channels at a time in registers. Only the fit of a channel's levels needs all tokens: one barrier
// per channel. docs/format.md, "shaped", is the specification.
#pragma once

#include <algorithm>

#include "append.cuh"

namespace vkvx {

constexpr int kShapeThreads = 512;  // of a multiprocessor, by its registers
constexpr int kMostWarps = kShapeThreads / 32;
constexpr int kShapeFits =
    2;  // sweeps that choose codes and levels; one more chooses the codes for the rounded levels

// Threads of a block that takes `tokens` of them each, and bytes of scratch and of shared memory
// that it needs.
inline int shape_threads(int group_size, int tokens) {
  return static_cast<int>(divide_up(divide_up(group_size, tokens), 32) * 32);
}
__host__ __device__ inline size_t shape_bytes(int tokens, int head_dim) {
  return static_cast<size_t>(tokens) * head_dim * 5;
}
inline int shape_shared(int head_dim, int channels, int threads) {
  return (head_dim * (3 + channels + std::max(4, threads / 32)) + channels * channels) * 4;
}

// The channel that RoPE turns together with one, and the sign of its part. Channels that are not
// turned are alone: their sine is 0.
struct RotaryPair {
  int other;
  float sign;
};

__device__ __forceinline__ RotaryPair rotary_pair(const VkvxParams& p, int channel) {
  const int turned = p.rotary_dim ? p.rotary_dim : p.head_dim, half = turned / 2;
  if (channel >= turned) return {channel, 0.0f};
  if (p.rotary_interleaved) return {channel ^ 1, channel % 2 ? 1.0f : -1.0f};
  return channel < half ? RotaryPair{channel + half, -1.0f} : RotaryPair{channel - half, 1.0f};
}

// Element (i, j) of a head's metric; that of keys is turned to the row's last position, R H R^T.
__device__ __forceinline__ float metric_at(const VkvxParams& p, bool is_key, int head, int b, int i,
                                           int j) {
  const int D = p.head_dim;
  const __half* metric = static_cast<const __half*>(is_key ? p.key_metric : p.value_metric) +
                         static_cast<int64_t>(head) * D * D;
  if (!is_key) return __half2float(metric[i * D + j]);
  const float* cosine = p.rotation + static_cast<int64_t>(b) * 2 * D;
  const float* sine = cosine + D;
  const RotaryPair pair_i = rotary_pair(p, i), pair_j = rotary_pair(p, j);
  const int other_i = pair_i.other, other_j = pair_j.other;
  const float sine_i = pair_i.sign * sine[i], sine_j = pair_j.sign * sine[j];
  auto row = [&](int column) {
    return __half2float(metric[i * D + column]) * cosine[i] +
           __half2float(metric[other_i * D + column]) * sine_i;
  };
  return row(j) * cosine[j] + row(other_j) * sine_j;
}

// Sums over the tokens of a channel that the fit of its levels needs.
struct FitSums {
  int codes, squares;
  float wanted, products;
};

// Sums over the block of codes, their squares, wanted numbers and products, in a fixed order; those
// of codes are exact. `partial` holds 2 * 4 * 16 entries, one for each warp of 16; calls take turns
// with its halves, so one barrier is enough. Those of warps that the block does not have are 0.
__device__ __forceinline__ FitSums add_over_block(const float (&x)[4], float* partial, int turn) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const bool up = lane & 16, high = lane & 8;
  const float a = (up ? x[2] : x[0]) + __shfl_xor_sync(kFull, up ? x[0] : x[2], 16);
  const float b = (up ? x[3] : x[1]) + __shfl_xor_sync(kFull, up ? x[1] : x[3], 16);
  float mine = (high ? b : a) + __shfl_xor_sync(kFull, high ? a : b, 8);
#pragma unroll
  for (int o = 4; o; o >>= 1) mine += __shfl_xor_sync(kFull, mine, o);
  float* half = partial + (turn & 1) * 4 * kMostWarps;
  if (lane % 8 == 0) half[lane / 8 * kMostWarps + warp] = mine;
  __syncthreads();
  // Lanes 8n to 8n + 7 add up sum n: the first two as integers.
  const float2 two = *reinterpret_cast<const float2*>(half + 2 * lane);
  int whole = static_cast<int>(two.x) + static_cast<int>(two.y);
  float real = two.x + two.y;
#pragma unroll
  for (int o = 4; o; o >>= 1) {
    const int other = __shfl_xor_sync(kFull, up ? __float_as_int(real) : whole, o);
    whole += other;
    real += __int_as_float(other);
  }
  FitSums sum;
  sum.codes = __shfl_sync(kFull, whole, 0);
  sum.squares = __shfl_sync(kFull, whole, 8);
  sum.wanted = __shfl_sync(kFull, real, 16);
  sum.products = __shfl_sync(kFull, real, 24);
  return sum;
}

// One group while it is shaped. In shared memory: mean, scale and low [D], tile [D][kChannels],
// later [kChannels][kChannels], partial.
template <int kChannels, int kTokens>
struct Shaper {
  const VkvxParams& p;
  int pitch;       // tokens of all threads
  float* error;    // [D][pitch]
  uint8_t* codes;  // [D][pitch]
  float *mean, *scale, *low, *tile, *later, *partial;
  int b, head, count;
  bool is_key;

  // A thread's tokens lie side by side.
  struct alignas(4 * kTokens) Errors {
    float of[kTokens];
  };
  struct alignas(kTokens) Codes {
    uint8_t of[kTokens];
  };

  __device__ bool is_live(int j) const {
    return kTokens * static_cast<int>(threadIdx.x) + j < count;
  }
  __device__ Errors& errors(int channel) const {
    return *reinterpret_cast<Errors*>(error + static_cast<int64_t>(channel) * pitch +
                                      kTokens * threadIdx.x);
  }
  __device__ Codes& codes_of(int channel) const {
    return *reinterpret_cast<Codes*>(codes + static_cast<int64_t>(channel) * pitch +
                                     kTokens * threadIdx.x);
  }

  // Means of the channels, the levels of `lloyd`, its codes, and what they leave.
  __device__ void start(const int* index, const __half* levels, int bits) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5,
              D = p.head_dim;
    const void* source = is_key ? p.key : p.value;
    const int64_t* stride = is_key ? p.key_stride : p.value_stride;
    const int64_t base = b * stride[0] + head * stride[1];
    auto load = [&](int i, int channel) {
      return clean(load_float(source, base + index[i] * stride[2] + channel, p.dtype));
    };
    for (int c = lane; c < D; c += 32) {
      float sum = 0.0f;
#pragma unroll 8
      for (int i = warp; i < count; i += warps) sum += load(i, c);
      partial[warp * D + c] = sum;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < D; c += blockDim.x) {
      float sum = 0.0f;
      for (int w = 0; w < warps; ++w) sum += partial[w * D + c];
      mean[c] = sum / static_cast<float>(count);
      scale[c] = __half2float(levels[c]);
      low[c] = __half2float(levels[D + c]) - mean[c];
    }
    __syncthreads();
    const float top = static_cast<float>((1 << bits) - 1);
    for (int c = lane; c < D; c += 32) {
      const float offset = __half2float(levels[D + c]), step = scale[c];
      for (int i = 4 * warp; i < pitch; i += 4 * warps) {
        float residual[4];
        uint32_t packed = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          residual[k] = 0.0f;
          if (i + k >= count) continue;
          const float x = load(i + k, c);
          const float code =
              step > 0.0f ? fminf(fmaxf(rintf((x - offset) / step), 0.0f), top) : 0.0f;
          residual[k] = x - mean[c] - fmaf(step, code, low[c]);
          packed |= static_cast<uint32_t>(code) << 8 * k;
        }
        const int64_t to = static_cast<int64_t>(c) * pitch + i;
        *reinterpret_cast<float4*>(error + to) =
            make_float4(residual[0], residual[1], residual[2], residual[3]);
        *reinterpret_cast<uint32_t*>(codes + to) = packed;
      }
    }
    __syncthreads();
  }

  // tile[k][i] = H(first + i, k), and of the channels themselves what comes after i: later[i][k] =
  // H(first + i + 1 + k, first + i).
  __device__ void load_tile(int first) {
    __syncthreads();
    for (int i = threadIdx.x; i < p.head_dim * kChannels; i += blockDim.x)
      tile[i] = metric_at(p, is_key, head, b, i / kChannels, first + i % kChannels);  // symmetric
    __syncthreads();
    for (int n = threadIdx.x; n < kChannels * kChannels; n += blockDim.x) {
      const int i = n / kChannels, k = n % kChannels + i + 1;
      later[n] = k < kChannels ? tile[(first + i) * kChannels + k] : 0.0f;
    }
    __syncthreads();
  }

  // pull = H e for the channels of the tile and the thread's tokens.
  __device__ void multiply(float (&pull)[kChannels][kTokens]) const {
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
#pragma unroll
      for (int j = 0; j < kTokens; ++j) pull[i][j] = 0.0f;
    constexpr int kAhead = kTokens > 4 ? 1 : 2;
    Errors next[kAhead];
    auto load = [&](int k) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) next[a] = errors(k + a);
    };
    load(0);
#pragma unroll 1
    for (int k = 0; k < p.head_dim; k += kAhead) {
      float e[kAhead][kTokens];
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
#pragma unroll
        for (int j = 0; j < kTokens; ++j) e[a][j] = next[a].of[j];
      if (k + kAhead < p.head_dim) load(k + kAhead);
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
#pragma unroll
        for (int i = 0; i < kChannels; i += 4) {
          const float4 h = *reinterpret_cast<const float4*>(tile + (k + a) * kChannels + i);
#pragma unroll
          for (int j = 0; j < kTokens; ++j) {
            pull[i][j] = fmaf(h.x, e[a][j], pull[i][j]);
            pull[i + 1][j] = fmaf(h.y, e[a][j], pull[i + 1][j]);
            pull[i + 2][j] = fmaf(h.z, e[a][j], pull[i + 2][j]);
            pull[i + 3][j] = fmaf(h.w, e[a][j], pull[i + 3][j]);
          }
        }
    }
  }

  // One pass over the channels that chooses codes and, if `fit`, levels.
  __device__ void sweep(bool fit, float top) {
    for (int i = threadIdx.x; i < 8 * kMostWarps; i += blockDim.x)
      partial[i] = 0.0f;  // load_tile has the barrier
    for (int first = 0; first < p.head_dim; first += kChannels) {
      load_tile(first);
      float pull[kChannels][kTokens];
      multiply(pull);
      Errors residual_next = errors(first);
      Codes code_next = codes_of(first);
      // pull[0] is always that of channel c: the code of this loop is long enough without a copy
      // for each channel.
#pragma unroll 1
      for (int i = 0; i < kChannels; ++i) {
        const int c = first + i;
        Errors residual = residual_next;
        Codes chosen = code_next;
        float step = scale[c], base = low[c], before[kTokens], code[kTokens], move[kTokens];
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          before[j] = fmaf(step, static_cast<float>(chosen.of[j]), base);
          move[j] = 0.0f;
        }
        if (i + 1 < kChannels) {
          residual_next = errors(c + 1);
          code_next = codes_of(c + 1);
        }
        if (step > 0.0f) {
          const float inverse = 1.0f / step, diagonal = 1.0f / tile[c * kChannels + i];
          float sums[4] = {};
#pragma unroll
          for (int j = 0; j < kTokens; ++j) {
            // Where this channel would have to be for the sum to be least, the others staying as
            // they are.
            const float wanted = fmaf(pull[0][j], diagonal, before[j]);
            code[j] = is_live(j) ? fminf(fmaxf(rintf((wanted - base) * inverse), 0.0f), top) : 0.0f;
            sums[0] += code[j];
            sums[1] = fmaf(code[j], code[j], sums[1]);
            sums[2] += is_live(j) ? wanted : 0.0f;
            sums[3] = fmaf(code[j], wanted, sums[3]);
          }
          if (fit) {
            const FitSums sum = add_over_block(sums, partial, i);
            const int64_t spread = static_cast<int64_t>(count) * sum.squares -
                                   static_cast<int64_t>(sum.codes) * sum.codes;
            if (spread > 0) {
              const float n = static_cast<float>(count), middle = static_cast<float>(sum.codes) / n;
              step = (sum.products - middle * sum.wanted) / (static_cast<float>(spread) / n);
              base = sum.wanted / n - step * middle;
              if (threadIdx.x == 0) scale[c] = step, low[c] = base;
            }
          }
#pragma unroll
          for (int j = 0; j < kTokens; ++j) {
            move[j] = is_live(j) ? fmaf(step, code[j], base) - before[j] : 0.0f;
            residual.of[j] -= move[j];
            chosen.of[j] = static_cast<uint8_t>(code[j]);
          }
          errors(c) = residual;
          codes_of(c) = chosen;
        }
#pragma unroll
        for (int k = 0; k < kChannels; k += 4) {
          const float4 h = *reinterpret_cast<const float4*>(later + i * kChannels + k);
#pragma unroll
          for (int j = 0; j < kTokens; ++j) {
            pull[k][j] = fmaf(-h.x, move[j], pull[k + 1][j]);
            pull[k + 1][j] = fmaf(-h.y, move[j], pull[k + 2][j]);
            pull[k + 2][j] = fmaf(-h.z, move[j], pull[k + 3][j]);
            pull[k + 3][j] =
                k + 4 < kChannels ? fmaf(-h.w, move[j], pull[(k + 4) % kChannels][j]) : 0.0f;
          }
        }
      }
    }
    __syncthreads();
  }

  // Rounds the levels to FP16 and stores them; the errors follow.
  __device__ void round_levels(__half* levels) {
    float* rounded = partial;  // scales, then the least levels
    const int D = p.head_dim;
    for (int c = threadIdx.x; c < D; c += blockDim.x) {
      const __half step = __float2half_rn(fminf(fmaxf(scale[c], 0.0f), kHalfMax));
      const float offset = __half2float(step) > 0.0f ? low[c] + mean[c] : mean[c];
      levels[c] = step;
      levels[D + c] = __float2half_rn(fminf(fmaxf(offset, -kHalfMax), kHalfMax));
      rounded[c] = __half2float(step);
      rounded[D + c] = __half2float(levels[D + c]) - mean[c];
    }
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < D; ++c) {
      Errors residual = errors(c);
      const Codes code = codes_of(c);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const float number = static_cast<float>(code.of[j]);
        if (is_live(j))
          residual.of[j] +=
              fmaf(scale[c], number, low[c]) - fmaf(rounded[c], number, rounded[D + c]);
      }
      errors(c) = residual;
      if (!(rounded[c] > 0.0f)) codes_of(c) = Codes{};
    }
    __syncthreads();
    for (int c = threadIdx.x; c < D; c += blockDim.x)
      scale[c] = rounded[c], low[c] = rounded[D + c];
    __syncthreads();
  }

  // The RMS of what is left of each channel, times the factor that makes the sum of H_cc rms_c^2
  // the mean of e . H e.
  __device__ void store_rms(__half* out) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5,
              D = p.head_dim;
    float whole = 0.0f;
    for (int first = 0; first < D; first += kChannels) {
      load_tile(first);
      float pull[kChannels][kTokens];
      multiply(pull);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const Errors residual = errors(first + i);
        float square = 0.0f;
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          square = fmaf(residual.of[j], residual.of[j], square);
          whole = fmaf(residual.of[j], pull[i][j], whole);
        }
        square = warp_sum(square);
        if (lane == 0) partial[warp * D + first + i] = square;
        if (threadIdx.x == 0)
          low[first + i] =
              tile[(first + i) * kChannels + i];  // the levels are stored: now the diagonal
      }
    }
    whole = warp_sum(whole);
    __syncthreads();
    if (lane == 0) tile[warp] = whole;
    const float n = static_cast<float>(count);
    for (int c = threadIdx.x; c < D; c += blockDim.x) {
      float square = 0.0f;
      for (int w = 0; w < warps; ++w) square += partial[w * D + c];
      mean[c] = square / n;
    }
    __syncthreads();
    float apart = 0.0f;
    whole = 0.0f;
    for (int w = 0; w < warps; ++w) whole += tile[w];
    for (int c = 0; c < D; ++c) apart = fmaf(mean[c], low[c], apart);
    const float factor = apart > 0.0f ? fmaxf(whole / n, 0.0f) / apart : 1.0f;
    for (int c = threadIdx.x; c < D; c += blockDim.x)
      out[c] = __float2half_rn(fminf(sqrtf(mean[c] * factor), kHalfMax));
  }

  // Packs the codes of the group whose words begin at `out`.
  __device__ void store_codes(int* out, int bits) const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5,
              D = p.head_dim, size = p.group_size;
    for (int first = 32 * warp; first < size; first += 32 * warps) {
      const int t = first + lane;
      for (int c = 0; c < D; c += 32) {
        uint32_t words[8] = {};
#pragma unroll 8
        for (int k = 0; k < 32; ++k) {
          const uint32_t code = codes[static_cast<int64_t>(c + k) * pitch + t];
#pragma unroll
          for (int plane = 0; plane < 8; ++plane) {
            if (plane >= bits) break;
            const uint32_t bit = code >> plane & 1;
            if (is_key)
              words[plane] |= bit << k;
            else if (const uint32_t packed = __ballot_sync(kFull, bit); lane == k)
              words[plane] = packed;
          }
        }
        int* to =
            is_key ? out + (static_cast<int64_t>(t / kTile) * bits * kTile + t % kTile) * (D / 32) +
                         c / 32
                   : out + (static_cast<int64_t>(first / kTile) * bits * D + c + lane) * 4 +
                         first % kTile / 32;
        const int64_t next = is_key ? kTile * (D / 32) : D * 4;
#pragma unroll
        for (int plane = 0; plane < 8; ++plane)
          if (plane < bits) to[plane * next] = static_cast<int>(words[plane]);
      }
    }
  }
};

// Blocks take groups in turn: group n is that of call group n / (2 Hkv B), and so on. Dynamic
// shared memory: see shape_shared.
template <int kChannels, int kTokens>
__global__ void __launch_bounds__(kTokens == 4 ? kShapeThreads / 2 : kShapeThreads,
                                  kTokens == 4 ? 2 : 1)
    shape_kernel(const __grid_constant__ VkvxParams p, char* scratch) {
  extern __shared__ float4 memory[];
  __shared__ int found[2];
  const int D = p.head_dim, call_groups = p.visual_entries / p.group_size;
  float* at = reinterpret_cast<float*>(memory);
  const int pitch = blockDim.x * kTokens;
  float* error = reinterpret_cast<float*>(scratch + blockIdx.x * shape_bytes(pitch, D));
  Shaper<kChannels, kTokens> s{p,
                               pitch,
                               error,
                               reinterpret_cast<uint8_t*>(error + static_cast<int64_t>(D) * pitch),
                               at,
                               at + D,
                               at + 2 * D,
                               at + 3 * D,
                               at + (3 + kChannels) * D,
                               at + (3 + kChannels) * D + kChannels * kChannels,
                               0,
                               0,
                               0,
                               false};
  const int groups = p.visual_capacity / p.group_size,
            problems = 2 * call_groups * p.kv_heads * p.rows;
  for (int n = blockIdx.x; n < problems; n += gridDim.x) {
    __syncthreads();
    s.is_key = n % 2 == 0;
    s.head = n / 2 % p.kv_heads;
    s.b = n / 2 / p.kv_heads % p.rows;
    const int g = n / 2 / p.kv_heads / p.rows;
    int group;
    if (!place_group(p, s.b, g, &group, &s.count, found)) continue;
    const int bits = s.is_key ? p.key_bits : p.value_bits, rows = s.is_key ? 3 : 2;
    const float top = static_cast<float>((1 << bits) - 1);
    const int64_t slot_head = static_cast<int64_t>(p.slot[s.b]) * p.kv_heads + s.head;
    __half* params = static_cast<__half*>(s.is_key ? p.visual_key_params : p.visual_value_params) +
                     (slot_head * groups + group) * rows * D;
    s.start(p.visual_index + static_cast<int64_t>(s.b) * p.visual_entries +
                static_cast<int64_t>(g) * p.group_size,
            params, bits);
    for (int sweep = 0; sweep < kShapeFits; ++sweep) s.sweep(true, top);
    s.round_levels(params);
    s.sweep(false, top);
    const int64_t tile = slot_head * (p.visual_capacity / kTile) +
                         static_cast<int64_t>(group) * (p.group_size / kTile);
    s.store_codes((s.is_key ? p.visual_key : p.visual_value) + tile * bits * kTile * (D / 32),
                  bits);
    if (s.is_key) s.store_rms(params + 2 * D);
  }
}

}  // namespace vkvx
