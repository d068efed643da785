// Attention of many new positions: causal over the call's own tokens, on top of all that is cached, with 16-bit tensor cores.
//
// A block of four warps takes 128 positions of one query head (64 of wide heads and in short calls) and walks over tiles of 64 keys: cached visual tokens
// (dequantised into shared memory, prefill_codes.cuh), cached text rows, own tokens. Scores and sums stay in registers, weights are normalised at the end
// (online softmax, Milakov and Gimelshein, arXiv 1805.02867). Queries stay in shared memory: a warp of 32 positions uses each
// fragment of keys or values twice. While scores are computed the tile's values arrive, and with the sums the next tile's keys, as in FlashAttention-2
// (arXiv 2307.08691).
#pragma once

#include "prefill_codes.cuh"

namespace vkvx {

constexpr int kPrefillMaxPositions = 1 << 17;

// Tiles of 16 positions that a warp takes: as many as its registers can hold the sums of, and one if all warps have work then.
constexpr int prefill_row_tiles(int dim, int positions) { return dim <= 128 && positions > kPrefillThreads / 2 ? 2 : 1; }
constexpr int prefill_rows(int tiles) { return kPrefillThreads / 2 * tiles; }
constexpr int prefill_blocks(int dim, int tiles) { return dim * tiles <= 160 ? 3 : 2; }  // of a multiprocessor

// Queries, a tile of keys and one of values, scales and offsets of keys, a score map for each position, and a bit for each position of the call.
constexpr int prefill_shared_bytes(int dim, int positions) {
  const int rows = prefill_rows(prefill_row_tiles(dim, positions));
  return (rows + 2 * kPrefillKeys + 2) * dim * 2 + rows * 8 + (positions + rows - 1) / rows * rows / 8;
}

template <bool kBfloat>
__device__ __forceinline__ float2 unpack_pair(uint32_t x) {
  if constexpr (kBfloat) return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
  return __half22float2(reinterpret_cast<const __half2&>(x));
}

template <bool kBfloat>
__device__ __forceinline__ void mma_pairs(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kBfloat)
    mma_bfloat(d, a[0], a[1], a[2], a[3], b0, b1);
  else
    mma_half(d, a[0], a[1], a[2], a[3], b0, b1);
}

// The lowest n bits.
__device__ __forceinline__ uint64_t lowest_bits(int n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }

// One block for 128 or 64 positions of a query head; the longest come first, so that the last ones to start are short.
template <int kDim, int kTiles, bool kBfloat>
__global__ void __launch_bounds__(kPrefillThreads, prefill_blocks(kDim, kTiles)) prefill_kernel(const __grid_constant__ VkvxParams p, const int* rank) {
#if VKVX_HAS_TENSOR_CORES
  constexpr int kChunks = kDim / 8, kSteps = kDim / 16, kRows = prefill_rows(kTiles);
  constexpr int kPitch = kDim * 2, kTileBytes = kPrefillKeys * kPitch;
  extern __shared__ __align__(128) char shared[];
  char *const key_tile = shared + kRows * kPitch, *const value_tile = key_tile + kTileBytes;
  __half* const key_params = reinterpret_cast<__half*>(value_tile + kTileBytes);
  float2* const maps = reinterpret_cast<float2*>(key_params + 2 * kDim);
  uint32_t* const present = reinterpret_cast<uint32_t*>(maps + kRows);
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(kFull, tid >> 5, 0), g = lane >> 2, t = lane & 3;
  const int S = p.positions, head = blockIdx.x, b = blockIdx.y, kv = head / (p.query_heads / p.kv_heads);
  const int first_row = (gridDim.z - 1 - blockIdx.z) * kRows;
  const int slot = p.slot[b];
  const int64_t out = (static_cast<int64_t>(b) * p.query_heads + head) * S;
  if (slot < 0) {
    for (int i = tid; i < kRows * kDim; i += kPrefillThreads)
      if (first_row + i / kDim < S) store_float(p.output, (out + first_row) * kDim + i, p.dtype, 0.0f);
    return;
  }
  // Which positions are tokens, up to this block's last one.
  const int* tokens = rank + static_cast<int64_t>(b) * S;
  const int last = min(first_row + kRows, S) - 1;
  const bool whole = tokens[last] == last;
  for (int i = warp; i < (first_row + kRows) / 32; i += kPrefillThreads / 32) {
    const uint32_t bits = whole ? kFull : __ballot_sync(kFull, 32 * i + lane < S && tokens[32 * i + lane] >= 0);
    if (lane == 0) present[i] = bits;
  }
  __syncthreads();

  constexpr int kTurn = kChunks % 8 ? 3 : 7;
  // Address of a chunk that is `chunk` (even) further in its row than that of `address`, whose own is 0 or 1.
  auto further = [](uint32_t address, int chunk) { return (address ^ (chunk & kTurn) << 4) + ((chunk & ~kTurn) << 4); };
  // `rows` rows from `first`, those that are not `valid` as zeros.
  auto copy_rows = [&](char* to, int rows, const void* data, int64_t base, int64_t stride, int first, auto valid) {
    constexpr int kUnit = kChunks % 8 ? 4 : 8;  // adjacent chunks that a row's threads take at once
    const char* from = static_cast<const char*>(data) + base * 2 + tid % kUnit * 16;
#pragma unroll
    for (int r = 0; r < rows; r += kPrefillThreads / kUnit) {
      const int row = tid / kUnit + r;
      const bool copied = valid(first + row);
      const char* row_from = from + (copied ? first + row : 0) * stride * 2;
      const uint32_t row_to = shared_address(to + place<kDim>(row, tid % kUnit));
#pragma unroll
      for (int c = 0; c < kChunks; c += kUnit) copy_async(row_to + c * 16, row_from + c * 16, copied);
    }
  };
  auto is_token = [&](int i) { return i < S && (present[i >> 5] >> (i & 31) & 1); };
  copy_rows(shared, kRows, p.query, b * p.query_stride[0] + head * p.query_stride[1], p.query_stride[2], first_row, is_token);

  const int groups = p.visual_capacity ? p.visual_capacity / p.group_size : 0, text_count = p.text_count[slot];
  const int* counts = p.visual_count + static_cast<int64_t>(slot) * groups;
  const int64_t slot_head = static_cast<int64_t>(slot) * p.kv_heads + kv;
  // The tiles in order; `group` and `first` (entry of the group, text row, or position) say where a tile is. With `scan` the
  // extremes of its scores are wanted only: `affine` needs those of all pictures first.
  constexpr int kText = -1, kOwn = -2, kEnd = -3;
  struct Cursor {
    int group, first;
    bool scan;
  };
  auto settle = [&](Cursor c) {
    if (c.group >= 0) {
      if (c.first >= counts[c.group]) c.group += 1, c.first = 0;
      if (c.group >= groups || counts[c.group] <= 0) c = c.scan ? Cursor{0, 0, false} : Cursor{kText, 0, false};
    }
    if (c.group == kText && c.first >= text_count) c = Cursor{kOwn, 0, false};
    if (c.group == kOwn && c.first > last) c.group = kEnd;
    return c;
  };
  auto copy_tile = [&](Cursor c, char* to, const void* text_rows, const void* rows, const int64_t (&stride)[3]) {
    if (c.group == kText)
      copy_rows(to, kPrefillKeys, text_rows, slot_head * p.text_capacity * kDim, kDim, c.first, [&](int i) { return i < text_count; });
    else
      copy_rows(to, kPrefillKeys, rows, b * stride[0] + kv * stride[1], stride[2], c.first, is_token);
  };
  auto tile_of = [&](Cursor c) { return slot_head * (p.visual_capacity / kTile) + (static_cast<int64_t>(c.group) * p.group_size + c.first) / kTile; };
  auto level_params = [&](const void* params, Cursor c, int rows) { return static_cast<const __half*>(params) + (slot_head * groups + c.group) * rows * kDim; };

  const int warp_row = 16 * kTiles * warp;
  const uint32_t query_at = shared_address(shared + place<kDim>(warp_row + (lane & 15), lane >> 4));
  const uint32_t key_at = shared_address(key_tile + place<kDim>((lane & 7) + 8 * (lane >> 4), lane >> 3 & 1));
  const uint32_t value_at = shared_address(value_tile + place<kDim>(lane & 15, lane >> 4));
  // What the correction adds for the warp's positions in the group at c, in units of log2.
  auto map_expected = [&](Cursor c) {
    const __half* rms = level_params(p.visual_key_params, c, 3) + 2 * kDim;
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
          const float2 rest = __half22float2(*reinterpret_cast<const __half2*>(rms + 16 * i + 8 * (r >> 1) + 2 * t));
          spread[r & 1] = fmaf(x.x * rest.x, x.x * rest.x, fmaf(x.y * rest.y, x.y * rest.y, spread[r & 1]));
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        spread[r] += __shfl_xor_sync(kFull, spread[r], 1);
        spread[r] += __shfl_xor_sync(kFull, spread[r], 2);
        const float excess = kLog2e * expected_correction(0.5f * p.scale * p.scale * spread[r], p.correction_limit);
        if (t == 0) maps[warp_row + 16 * m + 8 * r + g] = make_float2(p.scale * kLog2e, excess);
      }
    }
    __syncwarp();
  };
  // From extremes to maps.
  auto map_affine = [&]() {
    if (lane < 16 * kTiles) {
      const float2 extremes = maps[warp_row + lane];
      const float low = extremes.x * p.scale, high = extremes.y * p.scale;
      // Not quite 0, so that -inf stays it.
      const float slope = high > low ? fmaxf(1e-30f, (high - p.tau - low) / (high - low)) : 1.0f;
      maps[warp_row + lane] = make_float2(p.scale * kLog2e * slope, kLog2e * low * (1.0f - slope));
    }
    __syncwarp();
  };

  float sum[kTiles][kDim / 8][4] = {}, most[kTiles][2], total[kTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kTiles; ++m) most[m][0] = most[m][1] = -1e30f;
  Cursor c = groups && counts[0] > 0 ? Cursor{0, 0, p.correction == VKVX_CORRECTION_AFFINE} : settle(Cursor{kText, 0, false});
  if (c.scan && lane < 16 * kTiles) maps[warp_row + lane] = make_float2(INFINITY, -INFINITY);
  if (c.group < 0) copy_tile(c, key_tile, p.text_key, p.key, p.key_stride);
  copy_commit();
  while (c.group != kEnd) {
    const bool visual = c.group >= 0, own = c.group == kOwn;
    if (visual) {
      if (c.first == 0) {
        stage_key_params<kDim>(key_params, level_params(p.visual_key_params, c, 3), p.key_bits);
        __syncthreads();
      }
      const int* words = p.visual_key + tile_of(c) * p.key_bits * kTile * (kDim / 32) + c.first % kTile * (kDim / 32);
      with_bits(p.key_bits, [&](auto bits) { unpack_keys<bits(), kDim, kBfloat>(key_tile, words, key_params); });
    }
    copy_wait<0>();
    __syncthreads();
    if (!visual) {
      copy_tile(c, value_tile, p.text_value, p.value, p.value_stride);
      copy_commit();
    } else if (!c.scan) {
      const int* words = p.visual_value + tile_of(c) * p.value_bits * kDim * 4 + c.first % kTile / 32;
      with_bits(p.value_bits, [&](auto bits) { unpack_values<bits(), kDim>(value_tile, words, level_params(p.visual_value_params, c, 2)); });
      if (p.correction == VKVX_CORRECTION_EXPECTED && c.first == 0) map_expected(c);
    }
    // Nothing to do for a warp past the call's end, or for one that is all before these keys.
    const bool busy = first_row + warp_row < S && !(own && c.first >= first_row + warp_row + 16 * kTiles);
    float s[kTiles][8][4] = {};
    if (busy) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        uint32_t q[kTiles][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) load_matrices(q[m], further(query_at, 2 * i) + 16 * m * kPitch);
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
    copy_wait<0>();
    __syncthreads();
    const Cursor next = settle(Cursor{c.group, c.first + kPrefillKeys, c.scan});
    if (next.group == kText || next.group == kOwn) copy_tile(next, key_tile, p.text_key, p.key, p.key_stride);
    copy_commit();
    if (busy) {
      const int limit = own ? S : visual ? counts[c.group] : text_count;
      uint64_t valid = lowest_bits(limit - c.first);
      if (own) valid &= *reinterpret_cast<const uint64_t*>(present + c.first / 32);
      const int before = first_row + warp_row - c.first + 1;  // keys that the warp's first position sees, if own
      if (valid != ~0ull || (own && before < kPrefillKeys)) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const uint64_t seen = (own ? valid & lowest_bits(before + 16 * m + 8 * r + g) : valid) >> (2 * t);
            const uint32_t half[2] = {static_cast<uint32_t>(seen), static_cast<uint32_t>(seen >> 32)};
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
              for (int j = 0; j < 2; ++j)
                if (!(half[n >> 2] >> (8 * (n & 3) + j) & 1)) s[m][n][2 * r + j] = -INFINITY;
          }
      }
      if (c.scan) {
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
            float2& extremes = maps[warp_row + 16 * m + 8 * r + g];
            if (t == 0) extremes = make_float2(fminf(extremes.x, low), fmaxf(extremes.y, high));
          }
        __syncwarp();
        if (!next.scan) map_affine();
      } else {
        // Weights, 2^(step * score + bias - most). Sums are rescaled only if the greatest score grew much: weights are at most 2^8.
        const bool mapped = visual && p.correction != VKVX_CORRECTION_NONE;
        float step[kTiles][2], bias[kTiles][2], top[kTiles][2];
        bool grew = false;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float2 map = mapped ? maps[warp_row + 16 * m + 8 * r + g] : make_float2(p.scale * kLog2e, 0.0f);
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
              for (int n = 0; n < kDim / 8; ++n) sum[m][n][2 * r] *= fade, sum[m][n][2 * r + 1] *= fade;
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
        auto add_values = [&](auto as_bfloat) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t w[kTiles][4];
#pragma unroll
            for (int m = 0; m < kTiles; ++m)
#pragma unroll
              for (int r = 0; r < 4; ++r) {
                const float(&pair)[4] = s[m][2 * i + (r >> 1)];
                w[m][r] = pack_pair<as_bfloat()>(pair[2 * (r & 1)], pair[2 * (r & 1) + 1]);
              }
#pragma unroll
            for (int n = 0; n < kDim / 8; n += 2) {
              uint32_t v[4];
              load_matrices_transposed(v, further(value_at, n) + 16 * i * kPitch);
#pragma unroll
              for (int m = 0; m < kTiles; ++m)
#pragma unroll
                for (int e = 0; e < 2; ++e) mma_pairs<as_bfloat()>(sum[m][n + e], w[m], v[2 * e], v[2 * e + 1]);
            }
          }
        };
        if constexpr (!kBfloat)
          add_values(std::false_type());
        else if (visual)
          add_values(std::false_type());  // unpacked as fp16 numbers
        else
          add_values(std::true_type());
      }
    }
    c = next;
  }
  copy_wait<0>();
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[m][r] += __shfl_xor_sync(kFull, total[m][r], 1);
      total[m][r] += __shfl_xor_sync(kFull, total[m][r], 2);
      const int row = first_row + warp_row + 16 * m + 8 * r + g;
      if (row >= S) continue;
      const bool token = is_token(row);
      const float inverse = token ? 1.0f / total[m][r] : 0.0f;
      uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.output) + (out + row) * kDim) + t;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        float x = sum[m][n][2 * r] * inverse, y = sum[m][n][2 * r + 1] * inverse;
        if constexpr (!kBfloat) x = within_half(x), y = within_half(y);
        to[4 * n] = token ? pack_pair<kBfloat>(x, y) : 0u;
      }
    }
#endif
}

}  // namespace vkvx
