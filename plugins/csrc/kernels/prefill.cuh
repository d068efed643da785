// Attention of many new positions: causal over the call's own tokens, on top of all that is cached,
// with 16-bit tensor cores.
//
// A block of four warps takes 128 positions of one query head (64 of wide heads and in short calls)
// and walks over tiles of 64 keys: cached visual tokens (dequantised into shared memory,
// prefill_codes.cuh), cached text rows, own tokens. Scores and sums stay in registers, weights are
// normalised at the end (online softmax, Milakov and Gimelshein, arXiv 1805.02867). Queries stay in
// shared memory: a warp of 32 positions uses each fragment of keys or values twice. While scores
// are computed the tile's values arrive, and with the sums the next tile's keys, as in
// FlashAttention-2 (arXiv 2307.08691).
#pragma once

#include "prefill_warp.cuh"

namespace vkvx {

constexpr int kPrefillMaxPositions = 1 << 17;

// Tiles of 16 positions that a warp takes: as many as its registers can hold the sums of, and one
// if all warps have work then.
constexpr int prefill_row_tiles(int dim, int positions) {
  return dim <= 128 && positions > kPrefillThreads / 2 ? 2 : 1;
}
constexpr int prefill_rows(int tiles) { return kPrefillThreads / 2 * tiles; }
constexpr int prefill_blocks(int dim, int tiles) {
  return dim * tiles <= 160 ? 3 : 2;
}  // of a multiprocessor

// Queries, a tile of keys and one of values, scales and offsets of keys, a score map for each
// position, and a bit for each position of the call.
constexpr int prefill_shared_bytes(int dim, int positions) {
  const int rows = prefill_rows(prefill_row_tiles(dim, positions));
  return (rows + 2 * kPrefillKeys + 2) * dim * 2 + rows * 8 +
         (positions + rows - 1) / rows * rows / 8;
}

// `rows` rows from `first`, those that are not `valid` as zeros.
template <int kDim, class Valid>
__device__ __forceinline__ void copy_rows(char* to, int rows, const void* data, int64_t base,
                                          int64_t stride, int first, Valid valid) {
  constexpr int kChunks = kDim / 8;
  const int tid = threadIdx.x;
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
}

// Where a tile is: its group and entry of it, or kText and the text row, or kOwn and the position.
// With `scan` the extremes of its scores are wanted only: `affine` needs those of all pictures
// first.
struct PrefillCursor {
  static constexpr int kText = -1, kOwn = -2, kEnd = -3;
  int group, first;
  bool scan;
};

// What a block attends to.
struct PrefillLengths {
  const int* counts;             // of the groups
  int groups, text_count, last;  // `last`: own position

  // The tile at c, or the one that follows if there is none.
  __device__ __forceinline__ PrefillCursor settle(PrefillCursor c) const {
    using Cursor = PrefillCursor;
    if (c.group >= 0) {
      if (c.first >= counts[c.group]) c.group += 1, c.first = 0;
      if (c.group >= groups || counts[c.group] <= 0)
        c = c.scan ? Cursor{0, 0, false} : Cursor{Cursor::kText, 0, false};
    }
    if (c.group == Cursor::kText && c.first >= text_count) c = Cursor{Cursor::kOwn, 0, false};
    if (c.group == Cursor::kOwn && c.first > last) c.group = Cursor::kEnd;
    return c;
  }
};

// A bit for each of the first `end` positions that is a token; `last` is the last one of them that
// the call has.
__device__ __forceinline__ void find_tokens(uint32_t* present, const int* rank, int positions,
                                            int end, int last) {
  const int lane = threadIdx.x & 31, warp = __shfl_sync(kFull, threadIdx.x >> 5, 0);
  const bool whole = rank[last] == last;
  for (int i = warp; i < end / 32; i += kPrefillThreads / 32) {
    const uint32_t bits =
        whole ? kFull : __ballot_sync(kFull, 32 * i + lane < positions && rank[32 * i + lane] >= 0);
    if (lane == 0) present[i] = bits;
  }
}

// One block for 128 or 64 positions of a query head; the longest come first, so that the last ones
// to start are short.
template <int kDim, int kTiles, bool kBfloat>
__global__ void __launch_bounds__(kPrefillThreads, prefill_blocks(kDim, kTiles))
    prefill_kernel(const __grid_constant__ VkvxParams p, const int* rank) {
#if VKVX_HAS_TENSOR_CORES
  using Cursor = PrefillCursor;
  using Warp = PrefillWarp<kDim, kTiles, kBfloat>;
  constexpr int kRows = prefill_rows(kTiles), kPitch = kDim * 2, kTileBytes = kPrefillKeys * kPitch;
  extern __shared__ __align__(128) char shared[];
  char *const key_tile = shared + kRows * kPitch, *const value_tile = key_tile + kTileBytes;
  __half* const key_params = reinterpret_cast<__half*>(value_tile + kTileBytes);
  float2* const maps = reinterpret_cast<float2*>(key_params + 2 * kDim);
  uint32_t* const present = reinterpret_cast<uint32_t*>(maps + kRows);
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(kFull, tid >> 5, 0),
            g = lane >> 2, t = lane & 3;
  const int S = p.positions, head = blockIdx.x, b = blockIdx.y,
            kv = head / (p.query_heads / p.kv_heads);
  const int first_row = (gridDim.z - 1 - blockIdx.z) * kRows;
  const int slot = p.slot[b];
  const int64_t out = (static_cast<int64_t>(b) * p.query_heads + head) * S;
  if (slot < 0) {
    for (int i = tid; i < kRows * kDim; i += kPrefillThreads)
      if (first_row + i / kDim < S)
        store_float(p.output, (out + first_row) * kDim + i, p.dtype, 0.0f);
    return;
  }
  // Which positions are tokens, up to this block's last one.
  const int last = min(first_row + kRows, S) - 1;
  find_tokens(present, rank + static_cast<int64_t>(b) * S, S, first_row + kRows, last);
  __syncthreads();

  auto is_token = [&](int i) { return i < S && (present[i >> 5] >> (i & 31) & 1); };
  copy_rows<kDim>(shared, kRows, p.query, b * p.query_stride[0] + head * p.query_stride[1],
                  p.query_stride[2], first_row, is_token);

  const int groups = p.visual_capacity ? p.visual_capacity / p.group_size : 0,
            text_count = p.text_count[slot];
  const int* counts = p.visual_count + static_cast<int64_t>(slot) * groups;
  const int64_t slot_head = static_cast<int64_t>(slot) * p.kv_heads + kv;
  const PrefillLengths lengths{counts, groups, text_count, last};
  auto copy_tile = [&](Cursor c, char* to, const void* text_rows, const void* rows,
                       const int64_t (&stride)[3]) {
    if (c.group == Cursor::kText)
      copy_rows<kDim>(to, kPrefillKeys, text_rows, slot_head * p.text_capacity * kDim, kDim,
                      c.first, [&](int i) { return i < text_count; });
    else
      copy_rows<kDim>(to, kPrefillKeys, rows, b * stride[0] + kv * stride[1], stride[2], c.first,
                      is_token);
  };
  auto tile_of = [&](Cursor c) {
    return slot_head * (p.visual_capacity / kTile) +
           (static_cast<int64_t>(c.group) * p.group_size + c.first) / kTile;
  };
  auto level_params = [&](const void* params, Cursor c, int rows) {
    return static_cast<const __half*>(params) + (slot_head * groups + c.group) * rows * kDim;
  };

  const int warp_row = 16 * kTiles * warp;
  const uint32_t query_at = shared_address(shared + place<kDim>(warp_row + (lane & 15), lane >> 4));
  const uint32_t key_at =
      shared_address(key_tile + place<kDim>((lane & 7) + 8 * (lane >> 4), lane >> 3 & 1));
  const uint32_t value_at = shared_address(value_tile + place<kDim>(lane & 15, lane >> 4));
  float2* const warp_maps = maps + warp_row;
  Warp state;
  Cursor c = groups && counts[0] > 0 ? Cursor{0, 0, p.correction == VKVX_CORRECTION_AFFINE}
                                     : lengths.settle(Cursor{Cursor::kText, 0, false});
  if (c.scan && lane < 16 * kTiles) maps[warp_row + lane] = make_float2(INFINITY, -INFINITY);
  if (c.group < 0) copy_tile(c, key_tile, p.text_key, p.key, p.key_stride);
  copy_commit();
  while (c.group != Cursor::kEnd) {
    const bool visual = c.group >= 0, own = c.group == Cursor::kOwn;
    if (visual) {
      if (c.first == 0) {
        stage_key_params<kDim>(key_params, level_params(p.visual_key_params, c, 3), p.key_bits);
        __syncthreads();
      }
      const int* words = p.visual_key + tile_of(c) * p.key_bits * kTile * (kDim / 32) +
                         c.first % kTile * (kDim / 32);
      with_bits(p.key_bits, [&](auto bits) {
        unpack_keys<bits(), kDim, kBfloat>(key_tile, words, key_params);
      });
    }
    copy_wait<0>();
    __syncthreads();
    if (!visual) {
      copy_tile(c, value_tile, p.text_value, p.value, p.value_stride);
      copy_commit();
    } else if (!c.scan) {
      const int* words =
          p.visual_value + tile_of(c) * p.value_bits * kDim * 4 + c.first % kTile / 32;
      with_bits(p.value_bits, [&](auto bits) {
        unpack_values<bits(), kDim>(value_tile, words, level_params(p.visual_value_params, c, 2));
      });
      if (p.correction == VKVX_CORRECTION_EXPECTED && c.first == 0)
        Warp::map_expected(g, t, warp_maps, query_at,
                           level_params(p.visual_key_params, c, 3) + 2 * kDim, p);
    }
    // Nothing to do for a warp past the call's end, or for one that is all before these keys.
    const bool busy =
        first_row + warp_row < S && !(own && c.first >= first_row + warp_row + 16 * kTiles);
    float s[kTiles][8][4] = {};
    if (busy) Warp::multiply_keys(s, query_at, key_at);
    copy_wait<0>();
    __syncthreads();
    const Cursor next = lengths.settle(Cursor{c.group, c.first + kPrefillKeys, c.scan});
    if (next.group == Cursor::kText || next.group == Cursor::kOwn)
      copy_tile(next, key_tile, p.text_key, p.key, p.key_stride);
    copy_commit();
    if (busy) {
      const int limit = own ? S : visual ? counts[c.group] : text_count;
      uint64_t valid = lowest_bits(limit - c.first);
      if (own) valid &= *reinterpret_cast<const uint64_t*>(present + c.first / 32);
      const int before =
          first_row + warp_row - c.first + 1;  // keys that the warp's first position sees, if own
      if (valid != ~0ull || (own && before < kPrefillKeys))
        Warp::mask_scores(g, t, s, valid, own, before);
      if (c.scan) {
        Warp::take_extremes(g, t, s, warp_maps);
        if (!next.scan) Warp::map_affine(warp_maps, p);
      } else {
        state.softmax(g, s, warp_maps, visual && p.correction != VKVX_CORRECTION_NONE, p.scale);
        if (visual || !kBfloat)
          state.template add_values<false>(s, value_at);  // pictures are unpacked as fp16 numbers
        else
          state.template add_values<kBfloat>(s, value_at);
      }
    }
    c = next;
  }
  copy_wait<0>();
  state.store(g, t, static_cast<uint16_t*>(p.output) + out * kDim, first_row + warp_row, S,
              is_token);
#endif
}

}  // namespace vkvx
