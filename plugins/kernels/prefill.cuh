// Attention of many new positions: causal over the call's own tokens, on top of all that is cached, with 16-bit tensor cores.
//
// A block of four warps takes 64 positions of one query head, 16 a warp, and walks over tiles of 64 keys: cached visual tokens (dequantised into
// shared memory), cached text rows, own tokens. Scores and sums stay in registers, weights are normalised at the end (online softmax,
// Milakov and Gimelshein, arXiv 1805.02867; tiling as in FlashAttention-2, arXiv 2307.08691).
#pragma once

#include "common.cuh"

namespace vkvx {

constexpr int kPrefillWarps = 4;
constexpr int kPrefillRows = 16 * kPrefillWarps;
constexpr int kPrefillKeys = 64;

constexpr int kPrefillMaxPositions = 1 << 17;

// Queries, two stages of keys and values, and a bit for each position.
constexpr int prefill_shared_bytes(int dim, int positions) {
  return (kPrefillRows + 4 * kPrefillKeys) * dim * 2 + (positions + kPrefillRows - 1) / kPrefillRows * kPrefillRows / 8;
}

template <bool kBfloat>
__device__ __forceinline__ uint32_t pack_pair(float x, float y) {
  return kBfloat ? pack_bfloat2(x, y) : pack_half2(x, y);
}

template <bool kBfloat>
__device__ __forceinline__ float2 unpack_pair(uint32_t x) {
  if constexpr (kBfloat) return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
  return __half22float2(reinterpret_cast<const __half2&>(x));
}

template <int kDim, bool kBfloat>
__global__ void __launch_bounds__(kPrefillWarps * 32, 2) prefill_kernel(const __grid_constant__ VkvxParams p, const int* rank) {
#if VKVX_HAS_TENSOR_CORES
  constexpr int kChunks = kDim / 8, kSteps = kDim / 16;
  extern __shared__ __align__(128) char shared[];
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(kFull, tid >> 5, 0), g = lane >> 2, t = lane & 3;
  const int S = p.positions, head = blockIdx.y, b = blockIdx.z, kv = head / (p.query_heads / p.kv_heads);
  const int first_row = (gridDim.x - 1 - blockIdx.x) * kPrefillRows;  // the longest rows first
  const int slot = p.slot[b];
  const int* tokens = rank + static_cast<int64_t>(b) * S;
  const int64_t out = (static_cast<int64_t>(b) * p.query_heads + head) * S;
  if (slot < 0) {
    for (int i = tid; i < kPrefillRows * kDim; i += blockDim.x)
      if (first_row + i / kDim < S) store_float(p.output, (out + first_row) * kDim + i, p.dtype, 0.0f);
    return;
  }
  // Which positions are tokens, up to this block's last one.
  uint32_t* present = reinterpret_cast<uint32_t*>(shared + (kPrefillRows + 4 * kPrefillKeys) * kDim * 2);
  for (int i = warp; i < (first_row + kPrefillRows) / 32; i += kPrefillWarps) {
    const uint32_t bits = __ballot_sync(kFull, 32 * i + lane < S && tokens[32 * i + lane] >= 0);
    if (lane == 0) present[i] = bits;
  }
  __syncthreads();
  auto is_token = [&](int at) { return present[at >> 5] >> (at & 31) & 1; };
  const uint32_t query_buffer = shared_address(shared), tile_buffer = query_buffer + kPrefillRows * kDim * 2;
  constexpr int kTileBytes = kPrefillKeys * kDim * 2;
  auto place = [](int row, int chunk) { return (row * kChunks + (chunk ^ (row & 7 & (kChunks - 1)))) * 16; };
  auto load_rows = [&](uint32_t buffer, const void* data, int64_t base, int64_t stride, int first, int count, bool own) {
#pragma unroll
    for (int i = tid; i < 64 * kChunks; i += kPrefillWarps * 32) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool valid = first + row < count && (!own || is_token(first + row));
      copy_async(buffer + place(row, chunk), static_cast<const char*>(data) + (base + (valid ? first + row : 0) * stride + chunk * 8) * 2, valid);
    }
  };
  load_rows(query_buffer, p.query, b * p.query_stride[0] + head * p.query_stride[1], p.query_stride[2], first_row, S, true);
  copy_commit();

  const int groups = p.visual_capacity ? p.visual_capacity / p.group_size : 0, text_count = p.text_count[slot];
  const int* counts = p.visual_count + static_cast<int64_t>(slot) * groups;
  const int64_t slot_head = static_cast<int64_t>(slot) * p.kv_heads + kv, text = slot_head * p.text_capacity * kDim;
  const int64_t key_base = b * p.key_stride[0] + kv * p.key_stride[1], value_base = b * p.value_stride[0] + kv * p.value_stride[1];
  const int text_tiles = (text_count + kPrefillKeys - 1) / kPrefillKeys;
  const int own_tiles = (min(first_row + kPrefillRows, S) + kPrefillKeys - 1) / kPrefillKeys;
  // The tiles in order; `group` and `first` (entry of the group, text row, or position) say where a tile is.
  struct Cursor {
    int group, first;  // group -1: text, -2: own, -3: the end
  };
  auto settle = [&](Cursor c) {
    if (c.group >= 0) {
      if (c.group < groups && c.first >= counts[c.group]) c = Cursor{c.group + 1, 0};
      if (c.group >= groups || counts[c.group] <= 0) c = Cursor{-1, 0};
    }
    if (c.group == -1 && c.first >= text_tiles * kPrefillKeys) c = Cursor{-2, 0};
    if (c.group == -2 && c.first >= own_tiles * kPrefillKeys) c = Cursor{-3, 0};
    return c;
  };
  auto next = [&](Cursor c) { return settle(Cursor{c.group, c.first + kPrefillKeys}); };
  auto load = [&](Cursor c, int stage) {
    const uint32_t keys = tile_buffer + stage * 2 * kTileBytes, values = keys + kTileBytes;
    if (c.group == -1) {
      load_rows(keys, p.text_key, text, kDim, c.first, text_count, false);
      load_rows(values, p.text_value, text, kDim, c.first, text_count, false);
    } else if (c.group == -2) {
      load_rows(keys, p.key, key_base, p.key_stride[2], c.first, S, true);
      load_rows(values, p.value, value_base, p.value_stride[2], c.first, S, true);
    } else if (c.group >= 0) {
      const __half* key_params = static_cast<const __half*>(p.visual_key_params) + (slot_head * groups + c.group) * 3 * kDim;
      const __half* value_params = static_cast<const __half*>(p.visual_value_params) + (slot_head * groups + c.group) * 2 * kDim;
      const int64_t tile = slot_head * (p.visual_capacity / kTile) + (static_cast<int64_t>(c.group) * p.group_size + c.first) / kTile;
      const int* key_words = p.visual_key + tile * p.key_bits * kTile * (kDim / 32);
      const int* value_words = p.visual_value + tile * p.value_bits * kDim * 4;
      for (int i = tid; i < 64 * kChunks; i += kPrefillWarps * 32) {
        const int row = i / kChunks, chunk = i % kChunks, entry = c.first % kTile + row;
        uint32_t key[4], value[4];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          float k[2], v[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int d = 8 * chunk + 2 * pair + e;
            const int kc = gather_code(key_words + entry * (kDim / 32) + d / 32, kTile * (kDim / 32), p.key_bits, d % 32);
            const int vc = gather_code(value_words + d * 4 + entry / 32, kDim * 4, p.value_bits, entry % 32);
            k[e] = fmaf(__half2float(key_params[d]), static_cast<float>(kc), __half2float(key_params[kDim + d]));
            v[e] = fmaf(__half2float(value_params[d]), static_cast<float>(vc), __half2float(value_params[kDim + d]));
          }
          key[pair] = pack_pair<kBfloat>(k[0], k[1]);
          value[pair] = pack_pair<kBfloat>(v[0], v[1]);
        }
        char* to = shared + kPrefillRows * kDim * 2 + stage * 2 * kTileBytes + place(row, chunk);
        *reinterpret_cast<uint4*>(to) = make_uint4(key[0], key[1], key[2], key[3]);
        *reinterpret_cast<uint4*>(to + kTileBytes) = make_uint4(value[0], value[1], value[2], value[3]);
      }
    }
    copy_commit();
  };

  Cursor cursor = settle(Cursor{groups ? 0 : -1, 0});
  load(cursor, 0);
  copy_wait<1>();
  __syncthreads();
  uint32_t query[kSteps][4];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) load_matrices(query[i], query_buffer + place(16 * warp + (lane & 15), 2 * i + (lane >> 4)));
  float sum[kDim / 8][4] = {}, most[2] = {-1e30f, -1e30f}, total[2] = {}, excess[2] = {};
  const float factor = p.scale * kLog2e;
  int corrected = -1;
  for (int stage = 0; cursor.group != -3; stage ^= 1) {
    const Cursor following = next(cursor);
    load(following, stage ^ 1);
    copy_wait<1>();
    __syncthreads();
    const uint32_t keys = tile_buffer + stage * 2 * kTileBytes, values = keys + kTileBytes;
    float s[8][4] = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t k[4];
        load_matrices(k, keys + place(8 * n + (lane & 7) + 8 * (lane >> 4), 2 * i + (lane >> 3 & 1)));
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if constexpr (kBfloat)
            mma_bfloat(s[n + e], query[i][0], query[i][1], query[i][2], query[i][3], k[2 * e], k[2 * e + 1]);
          else
            mma_half(s[n + e], query[i][0], query[i][1], query[i][2], query[i][3], k[2 * e], k[2 * e + 1]);
      }
    if (cursor.group >= 0 && p.correction == VKVX_CORRECTION_EXPECTED && cursor.group != corrected) {
      // What the correction adds for rows g and g + 8, in units of log2.
      corrected = cursor.group;
      const __half* rms = static_cast<const __half*>(p.visual_key_params) + ((slot_head * groups + cursor.group) * 3 + 2) * kDim;
      float spread[2] = {};
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int c = 16 * i + 8 * (r >> 1) + 2 * t;
          const float2 q = unpack_pair<kBfloat>(query[i][r]);
          const float x = q.x * __half2float(rms[c]), y = q.y * __half2float(rms[c + 1]);
          spread[r & 1] = fmaf(x, x, fmaf(y, y, spread[r & 1]));
        }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        spread[r] += __shfl_xor_sync(kFull, spread[r], 1);
        spread[r] += __shfl_xor_sync(kFull, spread[r], 2);
        excess[r] = kLog2e * expected_correction(0.5f * p.scale * p.scale * spread[r], p.correction_limit);
      }
    }
    const bool own = cursor.group == -2;
    const int limit = own ? S : cursor.group == -1 ? text_count : counts[cursor.group];
    const bool gaps = own && (present[cursor.first >> 5] & present[(cursor.first >> 5) + 1]) != kFull;
    const bool masked = cursor.first + kPrefillKeys > limit || gaps || (own && cursor.first + kPrefillKeys > first_row);
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float x = fmaf(s[n][j], factor, cursor.group >= 0 ? excess[j >> 1] : 0.0f);
        if (masked) {
          const int key = cursor.first + 8 * n + 2 * t + (j & 1);
          const bool seen = key < limit && (!own || (key <= first_row + 16 * warp + g + 8 * (j >> 1) && is_token(key)));
          x = seen ? x : -INFINITY;
        }
        s[n][j] = x;
        top[j >> 1] = fmaxf(top[j >> 1], x);
      }
    float fade[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(kFull, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(kFull, top[r], 2));
      const float now = fmaxf(most[r], top[r]);
      fade[r] = exp2_fast(most[r] - now);
      most[r] = now;
      total[r] *= fade[r];
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[n][j] *= fade[j >> 1];
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[n][j] = exp2_fast(s[n][j] - most[j >> 1]);
        total[j >> 1] += s[n][j];
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t w[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) w[r] = pack_pair<kBfloat>(s[2 * i + (r >> 1)][2 * (r & 1)], s[2 * i + (r >> 1)][2 * (r & 1) + 1]);
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 2) {
        uint32_t v[4];
        load_matrices_transposed(v, values + place(16 * i + (lane & 15), n + (lane >> 4)));
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if constexpr (kBfloat)
            mma_bfloat(sum[n + e], w[0], w[1], w[2], w[3], v[2 * e], v[2 * e + 1]);
          else
            mma_half(sum[n + e], w[0], w[1], w[2], w[3], v[2 * e], v[2 * e + 1]);
      }
    }
    cursor = following;
    __syncthreads();
  }
  copy_wait<0>();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(kFull, total[r], 1);
    total[r] += __shfl_xor_sync(kFull, total[r], 2);
    const int row = first_row + 16 * warp + g + 8 * r;
    if (row >= S) continue;
    const bool token = is_token(row);
    const float inverse = token ? 1.0f / total[r] : 0.0f;
    uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.output) + (out + row) * kDim) + t;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      float x = sum[n][2 * r] * inverse, y = sum[n][2 * r + 1] * inverse;
      if constexpr (!kBfloat) x = within_half(x), y = within_half(y);
      to[4 * n] = token ? pack_pair<kBfloat>(x, y) : 0u;
    }
  }
#endif
}

}  // namespace vkvx
