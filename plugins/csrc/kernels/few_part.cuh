// Decode attention of few rows: what a block takes, and how it comes into shared memory.
#pragma once

#include "cluster.cuh"
#include "decode_rows.cuh"

namespace vkvx {

constexpr int kFewWarps = 16, kFewThreads = 32 * kFewWarps;
constexpr int kFewColumns = 4;  // query vectors of a block
constexpr int kFewDim = 128;

// What a block keeps in shared memory, in bytes from its start.
struct FewLayout {
  int counts, steps, totals, query_bytes, value_params, keys, values, rows, scores, weights, total;
  int score_stride;  // floats of a query vector

  FewLayout() = default;
  __host__ __device__ FewLayout(int count_words, int tiles, int rows_at_once, int key_bits,
                                int value_bits) {
    int used = 0;
    auto take = [&](int bytes) {
      const int at = used;
      used += (bytes + 127) & ~127;
      return at;
    };
    const int row_tiles = (rows_at_once + kTile - 1) / kTile;
    counts = take(count_words * 4);
    steps = take(tiles * kFewColumns * 8);
    totals = take(tiles * kFewColumns * 4);
    query_bytes = take(tiles * 2 * kFewColumns * kFewDim);
    value_params = take(tiles * 4 * kFewDim);
    keys = take(tiles * key_bits * kFewDim * 16);
    values = take(tiles * value_bits * kFewDim * 16);
    rows = take(rows_at_once * kFewDim * 4);
    score_stride = (tiles + row_tiles) * kTile + 8;
    scores = take(kFewColumns * score_stride * 4);
    weights = take(tiles * 2 * kFewColumns * kTile + row_tiles * 4 * kFewColumns * kTile);
    total = used;
  }
};

struct FewPlan {
  int parts, part_bits;  // a power of two: blocks of a cluster
  int groups, group_tiles;
  unsigned reciprocal;  // of group_tiles, times 2^31, rounded up
  int tiles, rows;      // of a block at a time; rows a multiple of 32
  int ratio;            // query heads of a KV head
  bool reads_all;       // the counts of all slots, while the row's slot is on its way
  bool appends;         // the call's text token is stored, too
  FewLayout layout;
};

// A block's part of one row and KV head, for up to four of its query vectors, on its way into
// shared memory.
struct FewPart {
  const VkvxParams& p;
  const FewPlan& plan;
  char* shared;
  uint16_t (*raw)[kFewDim + 8];  // queries as the model gives them
  int* largest;                  // score of each vector so far, as an ordered integer
  int lane, warp, g, t;
  int part, column, head, b;  // column: the first
  int slot_head, text_count;
  bool is_token;
  const int* counts;  // of the slot's groups
  float query[4];     // channels 4 * lane to 4 * lane + 3 of vector warp % 4, times scale * log2 e
  int tile, tile_end, row, row_end;  // what is left of the part
  int tiles, rows;                   // of them at once; padded rows
  int first_group, groups;           // of these tiles
  uint2 params[3];

  __device__ __forceinline__ FewPart(const VkvxParams& params, const FewPlan& few_plan,
                                     char* memory, uint16_t (*queries)[kFewDim + 8], int* scores)
      : p(params),
        plan(few_plan),
        shared(memory),
        raw(queries),
        largest(scores),
        lane(threadIdx.x & 31),
        warp(threadIdx.x >> 5),
        g(lane >> 2),
        t(lane & 3),
        part(blockIdx.x & (plan.parts - 1)),
        column(blockIdx.x >> plan.part_bits << 2),
        head(blockIdx.y),
        b(blockIdx.z) {}

  template <class T>
  __device__ __forceinline__ T* at(int offset) const {
    return reinterpret_cast<T*>(shared + offset);
  }

  __device__ __forceinline__ int group_of(int x) const {
    return __umulhi(2 * x + 1, plan.reciprocal);
  }

  __device__ __forceinline__ void load_counts(const int* from, int n) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += kFewThreads) at<int>(plan.layout.counts)[i] = from[i];
  }

  // The row's slot, counts, queries; false if it has none.
  template <bool kBfloat>
  __device__ __forceinline__ bool find_row() {
    const int slot = p.slot[b];
    is_token = p.text_index[b] >= 0;
    const int vector = warp & 3, head_of = head * plan.ratio + column + vector;
    uint2 q = make_uint2(0, 0);
    if (column + vector < plan.ratio)
      q = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.query) +
                                          b * p.query_stride[0] + head_of * p.query_stride[1] +
                                          4 * lane);
    counts = at<int>(plan.layout.counts);
    if (plan.reads_all) {
      load_counts(p.visual_count, p.slots * plan.groups);
      if (threadIdx.x < p.slots) largest[kFewColumns + threadIdx.x] = p.text_count[threadIdx.x];
    }
    if (slot < 0) return false;
    slot_head = slot * p.kv_heads + head;
    if (!plan.reads_all) {
      load_counts(p.visual_count + static_cast<int64_t>(slot) * plan.groups, plan.groups);
      text_count = p.text_count[slot];
    } else {
      counts += slot * plan.groups;
    }
    if (!is_token) q = make_uint2(0, 0);
    if (warp < kFewColumns) *reinterpret_cast<uint2*>(&raw[warp][4 * lane]) = q;
    if (threadIdx.x < kFewColumns) largest[threadIdx.x] = INT32_MIN;
    const float factor = p.scale * kLog2e;
    const uint32_t pairs[2] = {q.x, q.y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 x = kBfloat ? make_float2(__uint_as_float(pairs[i] << 16),
                                             __uint_as_float(pairs[i] & 0xffff0000u))
                               : __half22float2(reinterpret_cast<const __half2&>(pairs[i]));
      query[2 * i] = x.x * factor;
      query[2 * i + 1] = x.y * factor;
    }
    __syncthreads();
    if (plan.reads_all) text_count = largest[kFewColumns + slot];
    return true;
  }

  // This block's part: tiles from the first on, rows, of which the call's own is the last, from the
  // last on.
  __device__ __forceinline__ void find_part() {
    int used = 0;
#pragma unroll 1
    for (int base = 0; base < plan.groups; base += 32)
      used += __popc(__ballot_sync(kFull, base + lane < plan.groups && counts[base + lane] > 0));
    const int all = used * plan.group_tiles, each = (all + plan.parts - 1) >> plan.part_bits;
    tile = min(part * each, all);
    tile_end = min(tile + each, all);
    const int chunks = text_count / kRowsAtOnce + 1,  // with the own row
        rows_each = ((chunks + plan.parts - 1) >> plan.part_bits) * kRowsAtOnce;
    row = min((plan.parts - 1 - part) * rows_each, text_count + 1);
    row_end = min(row + rows_each, text_count + 1);
  }

  // Element x of the arrays of the slot and head, which have n each.
  __device__ __forceinline__ int64_t of_head(int n, int x) const {
    return static_cast<int64_t>(slot_head) * n + x;
  }

  __device__ __forceinline__ void copy(int to, const void* from, int bytes) const {
    const uint32_t there = shared_address(shared + to);
#pragma unroll 1
    for (int i = threadIdx.x * 16; i < bytes; i += kFewThreads * 16)
      copy_async(there + i, static_cast<const char*>(from) + i);
  }

  // Sends what comes next on its way into shared memory.
  template <bool kBfloat>
  __device__ __forceinline__ void load() {
    tiles = min(plan.tiles, tile_end - tile);
    rows = min(plan.rows, (row_end - row + 31) & ~31);
    first_group = group_of(tile);
    groups = tiles > 0 ? group_of(tile + tiles - 1) - first_group + 1 : 0;
    load_key_params(warp >> 2);
    const int64_t first = of_head(plan.groups * plan.group_tiles, tile);
    copy(plan.layout.keys, p.visual_key + first * p.key_bits * kFewDim * 4,
         tiles * p.key_bits * kFewDim * 16);
    copy(plan.layout.values, p.visual_value + first * p.value_bits * kFewDim * 4,
         tiles * p.value_bits * kFewDim * 16);
    copy(plan.layout.value_params,
         static_cast<const __half*>(p.visual_value_params) +
             of_head(plan.groups, first_group) * 2 * kFewDim,
         groups * 4 * kFewDim);
    if (p.text_bits == 8)
      load_codes<kBfloat>();
    else
      load_rows();
    copy_commit();
  }

  __device__ __forceinline__ uint32_t key_rows() const {
    return shared_address(shared + plan.layout.rows);
  }
  __device__ __forceinline__ uint32_t value_rows() const {
    return key_rows() + plan.rows * kFewDim * 2;
  }
  __device__ __forceinline__ const char* own(bool is_value) const {
    const int64_t (&stride)[3] = is_value ? p.value_stride : p.key_stride;
    return static_cast<const char*>(is_value ? p.value : p.key) +
           (b * stride[0] + head * stride[1]) * 2;
  }

  // Rows, and zeros after the last.
  __device__ __forceinline__ void load_rows() const {
    const int chunk = threadIdx.x & 15;
    const bool is_value = threadIdx.x & 16;
    const char* cached = static_cast<const char*>(is_value ? p.text_value : p.text_key) +
                         of_head(p.text_capacity, 0) * (2 * kFewDim) + chunk * 16;
    const char* mine = own(is_value) + chunk * 16;
    const uint32_t to = is_value ? value_rows() : key_rows();
#pragma unroll 1
    for (int i = warp; i < rows; i += kFewWarps) {
      const bool exists = row + i < row_end;
      copy_async(
          to + row_place<kFewDim>(i, chunk),
          row + i < text_count ? cached + static_cast<int64_t>(row + i) * (2 * kFewDim) : mine,
          exists);
    }
  }

  template <bool kBfloat>
  __device__ __forceinline__ void load_codes() const {
#pragma unroll 1
    for (int i = warp * kRowsAtOnce; i < rows; i += kFewWarps * kRowsAtOnce) {
      const int left = min(text_count, row_end) - row - i;  // cached ones
      const int64_t first = of_head(p.text_capacity, row + i) * text_words(kFewDim);
      const uint32_t keys = key_rows() + i * kFewDim * 2, values = value_rows() + i * kFewDim * 2;
      load_code_rows<kBfloat, kFewDim>(static_cast<const int*>(p.text_key) + first,
                                       static_cast<const int*>(p.text_value) + first,
                                       left <= 0 ? 0u : kFull >> (32 - min(left, kRowsAtOnce)),
                                       kFewDim, keys, values);
      __syncwarp();
      if (left >= 0 && left < kRowsAtOnce && text_count < row_end)
        copy_async((lane & 16 ? values : keys) + row_place<kFewDim>(left, lane & 15),
                   own(lane & 16) + (lane & 15) * 16);
    }
  }

  // Scales, offsets and errors of the lane's four channels, of the keys of group `first_group + i`.
  __device__ __forceinline__ void load_key_params(int i) {
    if (i >= groups) return;
    const __half* from = static_cast<const __half*>(p.visual_key_params) +
                         of_head(plan.groups, first_group + i) * 3 * kFewDim + 4 * lane;
#pragma unroll
    for (int k = 0; k < 3; ++k) params[k] = *reinterpret_cast<const uint2*>(from + k * kFewDim);
  }
};

}  // namespace vkvx
