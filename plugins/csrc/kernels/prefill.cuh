// Attention of many new positions: causal over the call's own tokens, on top of all that is cached,
// with 16-bit tensor cores.
//
// A block of four warps takes 128 positions of one query head (64 of wide heads and in short calls;
// of heads wider than 256 two blocks take half of the output each) and walks over tiles of 64 keys:
// cached visual tokens (dequantised into shared memory, prefill_codes.cuh), cached text rows, own
// tokens. Scores and sums stay in registers, weights are normalised at the end (online softmax,
// Milakov and Gimelshein, arXiv 1805.02867). Queries stay in shared memory: a warp of 32 positions
// uses each fragment of keys or values twice. While scores are computed the tile's values arrive,
// and with the sums the next tile's keys, as in FlashAttention-2 (arXiv 2307.08691).
#pragma once

#include "prefill_warp.cuh"
#include "text_rows.cuh"

namespace vkvx {

constexpr int kPrefillMaxPositions = 1 << 17;

// Tiles of 16 positions that a warp takes: as many as its registers can hold the sums of, and one
// if all warps have work then.
constexpr int prefill_row_tiles(int dim, int positions) {
  return dim <= 128 && positions > kPrefillThreads / 2 ? 2 : 1;
}
constexpr int prefill_rows(int tiles) { return kPrefillThreads / 2 * tiles; }
constexpr int prefill_blocks(int dim, int tiles) {
  return dim * tiles <= 160 ? 3 : dim <= 256 ? 2 : 1;
}  // of a multiprocessor

// Queries, a tile of keys and one of values, scales and offsets of keys, a score map for each
// position, what each position sees if that is masked, and a bit for each position of the call.
constexpr int prefill_shared_bytes(int dim, int positions, bool masked) {
  const int rows = prefill_rows(prefill_row_tiles(dim, positions));
  return ((rows + kPrefillKeys + 2) * dim + kPrefillKeys * prefill_values(dim)) * 2 + rows * 8 +
         (masked ? rows * 16 : 0) + (positions + rows - 1) / rows * rows / 8;
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

// The same of text rows of 8 bits: kChannels of them from `channel` on, those from `end` on as
// zeros. A function of its own, so that it takes no registers from the loop over tiles.
template <int kDim, int kChannels, bool kBfloat>
static __device__ __noinline__ void unpack_rows(char* to, const int* words, int channel, int first,
                                                int end) {
  constexpr int kChunks = kChannels / 8;
  for (int i = threadIdx.x; i < kPrefillKeys * kChunks; i += kPrefillThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    uint2 codes = make_uint2(0, 0);
    int scale = 0;
    if (first + row < end) {
      const int* from = words + static_cast<int64_t>(first + row) * text_words(kDim);
      const int* mine = from + channel / 4 + 2 * chunk;
      codes = make_uint2(mine[0], mine[1]);
      scale = from[kDim / 4];
    }
    store_eight<kBfloat>(shared_address(to + place<kChannels>(row, chunk)), codes, scale_of(scale));
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

// What a block attends to: up to the counts and the own position `last`; text and own positions
// from the first tiles that one of its positions sees.
struct PrefillLengths {
  const int* counts;  // of the groups
  int groups, text_count, last, text_first, own_first;

  // The tile at c, or the one that follows if there is none.
  __device__ __forceinline__ PrefillCursor settle(PrefillCursor c) const {
    using Cursor = PrefillCursor;
    if (c.group >= 0) {
      if (c.first >= counts[c.group]) c.group += 1, c.first = 0;
      if (c.group >= groups || counts[c.group] <= 0)
        c = c.scan ? Cursor{0, 0, false} : Cursor{Cursor::kText, text_first, false};
    }
    if (c.group == Cursor::kText && c.first >= text_count)
      c = Cursor{Cursor::kOwn, own_first, false};
    if (c.group == Cursor::kOwn && c.first > last) c.group = Cursor::kEnd;
    return c;
  }
};

// Where the tiles of a KV head of a row are: `slot_head` counts the heads of all slots.
template <int kDim>
struct PrefillTiles {
  const VkvxParams& p;
  int row, head, groups, text_count;
  int64_t slot_head;

  __device__ __forceinline__ int64_t tile_of(PrefillCursor c) const {
    return slot_head * (p.visual_capacity / kTile) +
           (static_cast<int64_t>(c.group) * p.group_size + c.first) / kTile;
  }
  __device__ __forceinline__ const int* key_words(PrefillCursor c) const {
    return p.visual_key + tile_of(c) * p.key_bits * kTile * (kDim / 32) +
           c.first % kTile * (kDim / 32);
  }
  __device__ __forceinline__ const int* value_words(PrefillCursor c) const {
    return p.visual_value + tile_of(c) * p.value_bits * kDim * 4 + c.first % kTile / 32;
  }
  // Of the tile's group, from params with so many rows a group.
  __device__ __forceinline__ const __half* levels(const void* params, PrefillCursor c,
                                                  int rows) const {
    return static_cast<const __half*>(params) + (slot_head * groups + c.group) * rows * kDim;
  }
  // Channels from `channel` on of a tile of text rows or of own positions.
  template <int kChannels, bool kBfloat, class IsToken>
  __device__ __forceinline__ void copy(PrefillCursor c, char* to, int channel,
                                       const void* text_rows, const void* rows,
                                       const int64_t (&stride)[3], IsToken is_token) const {
    if (c.group == PrefillCursor::kText && p.text_bits == 8)
      unpack_rows<kDim, kChannels, kBfloat>(
          to, static_cast<const int*>(text_rows) + slot_head * p.text_capacity * text_words(kDim),
          channel, c.first, text_count);
    else if (c.group == PrefillCursor::kText)
      copy_rows<kChannels>(to, kPrefillKeys, text_rows,
                           slot_head * p.text_capacity * kDim + channel, kDim, c.first,
                           [&](int i) { return i < text_count; });
    else
      copy_rows<kChannels>(to, kPrefillKeys, rows, row * stride[0] + head * stride[1] + channel,
                           stride[2], c.first, is_token);
  }
};

// Zeros to so many rows of the output, from row `first` of all on: kValues channels each.
template <int kDim, int kValues>
__device__ __forceinline__ void clear_rows(const VkvxParams& p, int64_t first, int rows,
                                           int channel) {
  for (int i = threadIdx.x; i < rows * kValues; i += kPrefillThreads)
    store_float(p.output, (first + i / kValues) * kDim + channel + i % kValues, p.dtype, 0.0f);
}

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
template <int kDim, int kTiles, bool kBfloat, bool kMasked>
__global__ void __launch_bounds__(kPrefillThreads, prefill_blocks(kDim, kTiles))
    prefill_kernel(const __grid_constant__ VkvxParams p, const int* rank, const int* run_end) {
#if VKVX_HAS_TENSOR_CORES
  using Cursor = PrefillCursor;
  using Warp = PrefillWarp<kDim, kTiles, kBfloat>;
  constexpr int kRows = prefill_rows(kTiles), kPitch = kDim * 2, kValues = prefill_values(kDim),
                kParts = kDim / kValues;
  extern __shared__ __align__(128) char shared[];
  char *const key_tile = shared + kRows * kPitch, *const value_tile =
                                                      key_tile + kPrefillKeys * kPitch;
  __half* const key_params = reinterpret_cast<__half*>(value_tile + kPrefillKeys * kValues * 2);
  float2* const maps = reinterpret_cast<float2*>(key_params + 2 * kDim);
  Sight* const sights = reinterpret_cast<Sight*>(maps + kRows);
  uint32_t* const present = reinterpret_cast<uint32_t*>(sights + (kMasked ? kRows : 0));
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(kFull, tid >> 5, 0),
            g = lane >> 2, t = lane & 3;
  const int S = p.positions, head = blockIdx.x / kParts, b = blockIdx.y,
            kv = head / (p.query_heads / p.kv_heads), channel = blockIdx.x % kParts * kValues;
  const int first_row = (gridDim.z - 1 - blockIdx.z) * kRows;
  const int slot = p.slot[b];
  const int64_t out = (static_cast<int64_t>(b) * p.query_heads + head) * S;
  if (slot < 0) {
    clear_rows<kDim, kValues>(p, out + first_row, min(kRows, S - first_row), channel);
    return;
  }
  int last = min(first_row + kRows, S) - 1;  // position that the block sees
  Sight first{};                             // of its positions
  if constexpr (kMasked) {
    const int* ends = run_end == nullptr ? nullptr : run_end + static_cast<int64_t>(b) * S;
    auto sight = [&](int s) { return sight_of(p, b, s, ends == nullptr ? s : ends[s]); };
    for (int i = tid; i < kRows; i += kPrefillThreads) sights[i] = sight(min(first_row + i, last));
    first = sight(first_row);
    last = sight(last).last;
  }
  // Which positions are tokens, up to the last one that the block sees.
  find_tokens(present, rank + static_cast<int64_t>(b) * S, S,
              (last / kPrefillKeys + 1) * kPrefillKeys, last);
  __syncthreads();

  auto is_token = [&](int i) { return i < S && (present[i >> 5] >> (i & 31) & 1); };
  copy_rows<kDim>(shared, kRows, p.query, b * p.query_stride[0] + head * p.query_stride[1],
                  p.query_stride[2], first_row, is_token);

  const int groups = p.visual_capacity ? p.visual_capacity / p.group_size : 0,
            text_count = p.text_count[slot];
  const int* counts = p.visual_count + static_cast<int64_t>(slot) * groups;
  const int64_t slot_head = static_cast<int64_t>(slot) * p.kv_heads + kv;
  constexpr int kWhole = ~(kPrefillKeys - 1);
  const PrefillLengths lengths{
      counts, groups, text_count, last, first.text & kWhole, first.first & kWhole};
  const PrefillTiles<kDim> tiles{p, b, kv, groups, text_count, slot_head};
  auto copy_keys = [&](Cursor c) {
    tiles.template copy<kDim, kBfloat>(c, key_tile, 0, p.text_key, p.key, p.key_stride, is_token);
  };

  const int warp_row = 16 * kTiles * warp;
  const uint32_t query_at = shared_address(shared + place<kDim>(warp_row + (lane & 15), lane >> 4));
  const uint32_t key_at =
      shared_address(key_tile + place<kDim>((lane & 7) + 8 * (lane >> 4), lane >> 3 & 1));
  const uint32_t value_at = shared_address(value_tile + place<kValues>(lane & 15, lane >> 4));
  float2* const warp_maps = maps + warp_row;
  Warp state;
  Cursor c = groups && counts[0] > 0
                 ? Cursor{first.visual / p.group_size, first.visual % p.group_size & kWhole,
                          p.correction == VKVX_CORRECTION_AFFINE}
                 : Cursor{Cursor::kText, lengths.text_first, false};
  if (kMasked || c.group < 0) c = lengths.settle(c);
  int staged = -1;  // the group whose parameters are in shared memory
  if (c.scan && lane < 16 * kTiles) maps[warp_row + lane] = make_float2(INFINITY, -INFINITY);
  if (c.group < 0) copy_keys(c);
  copy_commit();
  while (c.group != Cursor::kEnd) {
    const bool visual = c.group >= 0, own = c.group == Cursor::kOwn;
    const bool enters = visual && (kMasked ? c.group != staged : c.first == 0);
    if (visual) {
      if (enters) {
        staged = c.group;
        stage_key_params<kDim>(key_params, tiles.levels(p.visual_key_params, c, 3), p.key_bits);
        __syncthreads();
      }
      const int* words = tiles.key_words(c);
      with_bits(p.key_bits, [&](auto bits) {
        unpack_keys<bits(), kDim, kBfloat>(key_tile, words, key_params);
      });
    }
    copy_wait<0>();
    __syncthreads();
    if (!visual) {
      tiles.template copy<kValues, kBfloat>(c, value_tile, channel, p.text_value, p.value,
                                            p.value_stride, is_token);
      copy_commit();
    } else if (!c.scan) {
      const int* words = tiles.value_words(c) + channel * 4;
      const __half* levels = tiles.levels(p.visual_value_params, c, 2) + channel;
      with_bits(p.value_bits, [&](auto bits) {
        unpack_values<bits(), kDim, kValues>(value_tile, words, levels);
      });
      if (p.correction == VKVX_CORRECTION_EXPECTED && enters)
        Warp::map_expected(g, t, warp_maps, query_at,
                           tiles.levels(p.visual_key_params, c, 3) + 2 * kDim, p);
    }
    // Nothing to do for a warp past the call's end, or for one that is all before these keys.
    const bool busy = first_row + warp_row < S &&
                      !(own && !kMasked && c.first >= first_row + warp_row + 16 * kTiles);
    float s[kTiles][8][4] = {};
    if (busy) Warp::multiply_keys(s, query_at, key_at);
    copy_wait<0>();
    __syncthreads();
    const Cursor next = lengths.settle(Cursor{c.group, c.first + kPrefillKeys, c.scan});
    if (next.group == Cursor::kText || next.group == Cursor::kOwn) copy_keys(next);
    copy_commit();
    if (busy) {
      const int limit = own ? S : visual ? counts[c.group] : text_count;
      uint64_t valid = lowest_bits(limit - c.first);
      if (own) valid &= *reinterpret_cast<const uint64_t*>(present + c.first / 32);
      const int before =
          first_row + warp_row - c.first + 1;  // keys that the warp's first position sees, if own
      if constexpr (kMasked)
        Warp::mask_sights(g, t, s, valid, sights + warp_row, visual, own,
                          visual ? c.group * p.group_size + c.first : c.first);
      else if (valid != ~0ull || (own && before < kPrefillKeys))
        Warp::mask_scores(g, t, s, valid, own, before);
      if (c.scan) {
        Warp::take_extremes(g, t, s, warp_maps);
        if (!next.scan) Warp::map_affine(warp_maps, p);
      } else {
        state.template softmax<kMasked>(g, s, warp_maps,
                                        visual && p.correction != VKVX_CORRECTION_NONE, p);
        if (visual || !kBfloat)
          state.template add_values<false>(s, value_at);  // pictures are unpacked as fp16 numbers
        else
          state.template add_values<kBfloat>(s, value_at);
      }
    }
    c = next;
  }
  copy_wait<0>();
  state.store(g, t, static_cast<uint16_t*>(p.output) + out * kDim + channel, first_row + warp_row,
              S, is_token);
#endif
}

}  // namespace vkvx
