// A block of the decode kernel: what it works on, and its steps but for the loop over tiles.
#pragma once

#include "decode_tiles.cuh"

namespace vkvx {

// Units of one warp: tiles of visual tokens, then chunks of text rows; chunk `own_row` is the
// call's own tokens.
struct WarpShare {
  int tile_begin, tile_end, row_begin, row_end, own_row;
};

// Steps are in the order in which the kernel takes them. Its loop over tiles, and the group starts
// that this reads, are not among them: in functions of their own they cost spills.
template <class Engine, bool kScan, int kLookahead>
struct DecodeBlock {
  static constexpr int kColumns = Engine::kColumns;
  using Loader = TileLoader<Engine, kScan, kLookahead>;

  const VkvxParams& p;
  const DecodePlan& plan;
  // In shared memory. Of the row: which positions are tokens, one bit each. Of each column: its
  // position, which tokens of the call it sees (one bit each), where its output starts.
  unsigned& tokens;
  int* position_of;
  unsigned* own_seen;
  int64_t* output_at;
  char* shared;  // what `layout` divides
  // Numbers of planes; without pictures (16 bits) any will do.
  int D, key_planes, value_planes;
  int tid, lane, warp, warps;
  int part, column_tile, head, b, ratio, S, first_column, columns, groups;
  DecodeLayout layout;
  float* queries;         // [columns][D + D / 8], times scale * log2 e
  uint16_t* raw_queries;  // [columns][D + 8], as the model gives them
  int* starts;            // first tile of each group in the list of tiles
  float2* affine;         // slope and offset that the correction gives scores of a column
  int slot = -1;

  __device__ __forceinline__ DecodeBlock(const VkvxParams& params, const DecodePlan& decode_plan,
                                         unsigned& shared_tokens, int* positions, unsigned* seen,
                                         int64_t* outputs, char* memory)
      : p(params),
        plan(decode_plan),
        tokens(shared_tokens),
        position_of(positions),
        own_seen(seen),
        output_at(outputs),
        shared(memory),
        D(Engine::kAny ? p.head_dim : Engine::kPaddedDim),
        key_planes(Engine::kAny ? min(p.key_bits, 8) : Engine::kPlanes),
        value_planes(Engine::kAny ? min(p.value_bits, 8) : Engine::kPlanes),
        tid(threadIdx.x),
        lane(tid & 31),
        warp(__shfl_sync(kFull, tid >> 5, 0)),
        warps(blockDim.x / 32),
        part(blockIdx.x % plan.splits),
        column_tile(blockIdx.x / plan.splits),
        head(blockIdx.y),
        b(blockIdx.z),
        ratio(p.query_heads / p.kv_heads),
        S(p.positions),
        first_column(column_tile * kColumns),
        columns(min(kColumns, ratio * S - first_column)),
        groups(p.visual_capacity ? p.visual_capacity / p.group_size : 0),
        layout(key_planes, value_planes, D, Engine::kPaddedDim, kColumns, plan.columns, kLookahead,
               groups, warps),
        queries(reinterpret_cast<float*>(shared + layout.queries)),
        raw_queries(reinterpret_cast<uint16_t*>(shared + layout.raw_queries)),
        starts(reinterpret_cast<int*>(shared + layout.starts)),
        affine(reinterpret_cast<float2*>(shared + layout.affine)) {}

  __device__ __forceinline__ char* memory_of(int w) const {
    return shared + layout.warps + w * layout.warp_bytes;
  }

  // Query head and position of a column.
  __device__ __forceinline__ void locate(int column, int& h, int& s) const {
    const unsigned at = first_column + column;
    h = S == 1 ? at : at / S;
    s = at - h * S;
  }

  // Sends the queries on their way into shared memory, by chunks of 8 channels.
  __device__ __forceinline__ void stage_queries() const {
    const int chunks = D / 8;
    for (int i = tid; i < kColumns * chunks; i += blockDim.x) {
      const int column = i / chunks, c = i % chunks * 8;
      const bool exists = column < columns;
      int h, s;
      locate(exists ? column : 0, h, s);
      const int64_t at = b * p.query_stride[0] + (head * ratio + h) * p.query_stride[1] +
                         s * p.query_stride[2] + c;
      copy_async(shared_address(raw_queries + column * (D + 8) + c),
                 static_cast<const uint16_t*>(p.query) + at, exists);
    }
    copy_commit();
  }

  // Positions and outputs of the columns, and the tokens of the row.
  __device__ __forceinline__ void locate_columns() const {
    if (tid < columns) {
      int h, s;
      locate(tid, h, s);
      position_of[tid] = s;
      own_seen[tid] = own_tokens(s);
      output_at[tid] = ((static_cast<int64_t>(b) * p.query_heads + head * ratio + h) * S + s) * D;
    }
    if (warp == warps - 1) {
      const unsigned found = collect_positions(p.visual_index, p.visual_entries, b) |
                             collect_positions(p.text_index, p.text_entries, b);
      if (lane == 0) tokens = found;
    }
  }

  // Positions of the call that position s sees, one bit each.
  __device__ __forceinline__ unsigned own_tokens(int s) const {
    if constexpr (!Engine::kMasked) return (2u << s) - 1;
    int next = S;  // text token
    bool is_text = false;
    for (int i = 0; i < p.text_entries; ++i) {
      const int at = p.text_index[static_cast<int64_t>(b) * p.text_entries + i];
      is_text |= at == s;
      if (at > s) next = min(next, at);
    }
    const Sight seen = sight_of(p, b, s, is_text ? s : next - 1);
    return (2u << seen.last) - (1u << seen.first);
  }

  // Where window_start of a column is, `kind` 0 for visual entries and 1 for text rows; 0 without a
  // window.
  __device__ __forceinline__ int start_of(int kind, int s) const {
    return p.sliding_window ? p.window_start[(static_cast<int64_t>(b) * 2 + kind) * S + s] : 0;
  }

  // The first cached entry that a column sees.
  __device__ __forceinline__ void set_first_seen(Engine& engine) const {
    if constexpr (Engine::kMasked) {
#pragma unroll
      for (int set = 0; set < kColumns / 4; ++set) {
        const int column = (lane & 3) + 4 * set;
        engine.first_seen[set] = column < columns ? start_of(0, position_of[column]) : 0;
      }
    }
  }

  // For a row without a slot.
  __device__ __forceinline__ void store_zeros() const {
    copy_wait<0>();
    __syncthreads();
    if (!kScan && part == 0)
      for (int i = tid; i < columns * (D / 4); i += blockDim.x)
        store_four(p.output, output_at[i / (D / 4)] + i % (D / 4) * 4, p.dtype,
                   make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }

  // The correction `affine` from the extremes that the parts of the scan found.
  __device__ __forceinline__ void find_affine(int64_t tile_id) const {
    float2 all = make_float2(INFINITY, -INFINITY);
    for (int s = 0; s < plan.splits; ++s) {
      const float2 x = plan.extremes[(tile_id * plan.splits + s) * 8 + tid];
      all = make_float2(fminf(all.x, x.x), fmaxf(all.y, x.y));
    }
    const float slope =
        all.y > all.x ? fmaxf(0.0f, (all.y - p.tau * kLog2e - all.x) / (all.y - all.x)) : 1.0f;
    affine[tid] = make_float2(slope, all.x * (1.0f - slope));
  }

  // First unit of a kind that starts at or past a cost, when units of that kind start at `base`.
  static __device__ __forceinline__ int first_unit(int64_t at, int64_t base, int unit_cost,
                                                   int units) {
    const int64_t n = at <= base ? 0 : divide_up(at - base, unit_cost);
    return static_cast<int>(n < units ? n : units);
  }

  // This warp's share of the units.
  __device__ __forceinline__ WarpShare share_units(int text_count) const {
    const int visual_cost = key_planes + value_planes, row_cost = 4;
    int hidden_tiles = 0, hidden_rows = 0;  // units that no position sees
    if constexpr (Engine::kMasked) {
      const int entry = start_of(0, 0), group = entry / p.group_size;
      hidden_tiles = group < groups
                         ? min(starts[group] + entry % p.group_size / kTile, starts[group + 1])
                         : starts[groups];
      hidden_rows = min(start_of(1, 0), text_count) / kRowsAtOnce;
    }
    const int visual_units = starts[groups] - hidden_tiles,
              row_units = kScan ? 0 : (text_count + kRowsAtOnce - 1) / kRowsAtOnce - hidden_rows;
    const int64_t cost =
        static_cast<int64_t>(visual_units) * visual_cost + (row_units + (kScan ? 0 : 1)) * row_cost;
    const int share = part * warps + warp, shares = plan.splits * warps;
    const int64_t low = cost * share / shares, high = cost * (share + 1) / shares;
    const int64_t visual_end = static_cast<int64_t>(visual_units) * visual_cost;
    // Starting and ending a group costs some tiles of few bits: shares of whole groups, if they are
    // not far from even ones.
    const bool snaps = Engine::kSnaps && cost >= static_cast<int64_t>(4 * visual_cost) * shares;
    auto first_tile = [&](int64_t at) {
      const int tile = hidden_tiles + first_unit(at, 0, visual_cost, visual_units);
      if (!snaps || tile == starts[groups]) return tile;
      int group = 0;
      while (starts[group + 1] <= tile) ++group;
      return tile - starts[group] == 1                               ? tile - 1
             : tile > starts[group] && starts[group + 1] - tile == 1 ? tile + 1
                                                                     : tile;
    };
    WarpShare mine;
    mine.tile_begin = first_tile(low);
    mine.tile_end = first_tile(high);
    mine.row_begin = hidden_rows + first_unit(low, visual_end, row_cost, row_units + 1);
    mine.row_end = hidden_rows + first_unit(high, visual_end, row_cost, row_units + 1);
    mine.own_row = hidden_rows + row_units;
    return mine;
  }

  __device__ __forceinline__ void start_result(WarpResult& result, char* mine) const {
    result.sums = reinterpret_cast<float*>(mine + layout.sums);
    result.most = reinterpret_cast<float*>(mine + layout.scalars);
    result.total = result.most + 8;
    result.columns = plan.columns;
    result.stride = DecodeLayout::sums_stride(Engine::kPaddedDim);
    result.empty = true;
  }

  // Both cursors at the warp's first tile.
  __device__ __forceinline__ void start_tiles(Loader& loader, TileCursor& cursor, char* mine,
                                              const WarpShare& share, bool has_tiles) const {
    const int64_t slot_head = static_cast<int64_t>(slot) * p.kv_heads + head;
    loader.lane = lane;
    loader.dim = D;
    loader.key_planes = key_planes;
    loader.value_planes = value_planes;
    loader.tile_end = share.tile_end;
    loader.keys = p.visual_key + slot_head * (p.visual_capacity / kTile) * key_planes * D * 4;
    loader.values = p.visual_value + slot_head * (p.visual_capacity / kTile) * value_planes * D * 4;
    loader.key_params =
        static_cast<const __half*>(p.visual_key_params) + slot_head * groups * 3 * D;
    loader.value_params =
        static_cast<const __half*>(p.visual_value_params) + slot_head * groups * 2 * D;
    loader.ahead = cursor = TileCursor{};
    loader.ahead.tile = share.tile_begin;
    if (has_tiles) loader.ahead.start(starts, share.tile_begin, p.group_size / kTile);
    cursor = loader.ahead;
    loader.reciprocal = Engine::kAny ? 524288 / D + 1 : 0;
    loader.key_buffer = shared_address(mine + layout.keys);
    loader.value_buffer = shared_address(mine + layout.values);
    loader.mine = mine;
    loader.layout = &layout;
  }

  // Queries of positions that are no tokens hold anything, and become 0. A thread converts what it
  // copied.
  __device__ __forceinline__ void convert_queries(float factor) const {
    const int chunks = D / 8;
    for (int i = tid; i < kColumns * chunks; i += blockDim.x) {
      const int column = i / chunks, c = i % chunks * 8;
      uint4* raw = reinterpret_cast<uint4*>(raw_queries + column * (D + 8) + c);
      uint4 packed = *raw;
      if (column >= columns || !(tokens >> position_of[column] & 1))
        *raw = packed = make_uint4(0, 0, 0, 0);
      float4* to = reinterpret_cast<float4*>(queries + column * (D + D / 8) + c + 4 * (c >> 5));
      const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
      float2 x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        x[k] = p.dtype == VKVX_BFLOAT16
                   ? make_float2(__uint_as_float(pairs[k] << 16),
                                 __uint_as_float(pairs[k] & 0xffff0000u))
                   : __half22float2(reinterpret_cast<const __half2&>(pairs[k]));
      }
      to[0] = make_float4(x[0].x * factor, x[0].y * factor, x[1].x * factor, x[1].y * factor);
      to[1] = make_float4(x[2].x * factor, x[2].y * factor, x[3].x * factor, x[3].y * factor);
    }
  }

  // What the scan found, for the decode after it.
  __device__ __forceinline__ void store_extremes(int64_t tile_id, char* mine,
                                                 const Engine& engine) const {
    float2* found = reinterpret_cast<float2*>(mine + layout.keys);
#pragma unroll
    for (int set = 0; set < kColumns / 4; ++set)
      if (lane < 4) found[4 * set + lane] = make_float2(engine.low[set], engine.high[set]);
    __syncthreads();
    if (tid < kColumns) {
      float2 all = make_float2(INFINITY, -INFINITY);
      for (int w = 0; w < warps; ++w) {
        const float2 x = reinterpret_cast<const float2*>(memory_of(w) + layout.keys)[tid];
        all = make_float2(fminf(all.x, x.x), fmaxf(all.y, x.y));
      }
      plan.extremes[(tile_id * plan.splits + part) * 8 + tid] = all;
    }
  }

  // The warp's chunks of text rows, and the own tokens if they are its.
  __device__ __forceinline__ void attend_rows(RowsEngine<Engine::kPaddedDim>& rows, char* mine,
                                              const WarpShare& share, int text_count,
                                              float factor) const {
    const int t = lane & 3;
    const uint32_t buffer = shared_address(mine);
    const bool coded = p.text_bits == 8;
    const int64_t row_bytes = coded ? 4 * text_words(D) : 2 * D,
                  at = (static_cast<int64_t>(slot) * p.kv_heads + head) * p.text_capacity *
                       row_bytes;
    RowSource source{static_cast<const char*>(p.text_key) + at,
                     static_cast<const char*>(p.text_value) + at, row_bytes, row_bytes, coded};
    uint32_t seen[2] = {kFull, kFull};
    int hidden[2] = {0, 0};  // text rows that columns 2t and 2t + 1 do not see
    if constexpr (Engine::kMasked)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (2 * t + c < columns) hidden[c] = start_of(1, position_of[2 * t + c]);
    for (int unit = share.row_begin; unit < share.row_end; ++unit) {
      int first = unit * kRowsAtOnce;
      uint32_t present =
          unit == share.own_row ? tokens : kFull >> (32 - min(kRowsAtOnce, text_count - first));
      if (unit == share.own_row) {
        source = {
            static_cast<const char*>(p.key) + (b * p.key_stride[0] + head * p.key_stride[1]) * 2,
            static_cast<const char*>(p.value) +
                (b * p.value_stride[0] + head * p.value_stride[1]) * 2,
            p.key_stride[2] * 2, p.value_stride[2] * 2, false};
        first = 0;
#pragma unroll
        for (int c = 0; c < 2; ++c) seen[c] = 2 * t + c < columns ? own_seen[2 * t + c] : kFull;
      } else if constexpr (Engine::kMasked) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int before = hidden[c] - first;
          seen[c] = before <= 0 ? kFull : before >= kRowsAtOnce ? 0 : kFull << before;
        }
      }
      const float bound = Engine::kMasked ? p.softcap * kLog2e : 0.0f;
      if (p.dtype == VKVX_BFLOAT16)
        rows.template attend<true, Engine::kMasked>(source, first, present, seen, factor, bound,
                                                    buffer);
      else
        rows.template attend<false, Engine::kMasked>(source, first, present, seen, factor, bound,
                                                     buffer);
    }
  }

  static __device__ __forceinline__ void add(float4& sum, float4 x, float weight) {
    sum = make_float4(fmaf(x.x, weight, sum.x), fmaf(x.y, weight, sum.y), fmaf(x.z, weight, sum.z),
                      fmaf(x.w, weight, sum.w));
  }

  __device__ __forceinline__ void store_output(int column, int c, float4 sum, float total) const {
    const float inverse = tokens >> position_of[column] & 1 ? 1.0f / total : 0.0f;
    const float4 x = inverse == 0.0f ? make_float4(0.0f, 0.0f, 0.0f, 0.0f)
                                     : make_float4(sum.x * inverse, sum.y * inverse,
                                                   sum.z * inverse, sum.w * inverse);
    store_four(p.output, output_at[column] + c, p.dtype, x);
  }

  // The results of the warps: the output if there is one part, else the part's.
  __device__ __forceinline__ void combine_warps(int64_t tile_id, const WarpResult& result) const {
    if (lane < 8 && result.empty) {
      result.most[lane] = -1e30f;
      result.total[lane] = 0.0f;
    }
    __syncthreads();
    auto scalars_of = [&](int w) {
      return reinterpret_cast<const float*>(memory_of(w) + layout.scalars);
    };
    float* partial =
        plan.partial + (tile_id * plan.splits + part) * partial_floats(plan.columns, D);
    for (int i = tid; i < columns * (D / 4); i += blockDim.x) {
      const int column = i / (D / 4), c = i % (D / 4) * 4;
      float most = -1e30f, total = 0.0f;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int w = 0; w < warps; ++w) most = fmaxf(most, scalars_of(w)[column]);
      for (int w = 0; w < warps; ++w) {
        const float l = scalars_of(w)[8 + column];
        if (l <= 0.0f) continue;  // a warp that had nothing to do
        const float weight = exp2_fast(scalars_of(w)[column] - most);
        total = fmaf(l, weight, total);
        add(sum,
            *reinterpret_cast<const float4*>(memory_of(w) + layout.sums +
                                             (column * result.stride + c) * 4),
            weight);
      }
      if (plan.splits == 1) {
        store_output(column, c, sum, total);
      } else {
        *reinterpret_cast<float4*>(partial + column * D + c) = sum;
        if (c == 0) {
          partial[plan.columns * D + column] = most;
          partial[plan.columns * D + 8 + column] = total;
        }
      }
    }
  }

  // Whether the other parts of this row and head are done; leaves the counter zero for the next
  // call if so.
  __device__ __forceinline__ bool arrives_last(int64_t tile_id, bool& last) const {
    __threadfence();
    __syncthreads();
    if (tid == 0) last = atomicAdd(plan.arrived + tile_id, 1) == plan.splits - 1;
    __syncthreads();
    if (!last) return false;
    __threadfence();
    if (tid == 0) plan.arrived[tile_id] = 0;
    return true;
  }

  __device__ __forceinline__ void combine_parts(int64_t tile_id) const {
    const float* parts = plan.partial + tile_id * plan.splits * partial_floats(plan.columns, D);
    for (int i = tid; i < columns * (D / 4); i += blockDim.x) {
      const int column = i / (D / 4), c = i % (D / 4) * 4;
      float most = -1e30f, total = 0.0f;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int s = 0; s < plan.splits; ++s)
        most = fmaxf(
            most, __ldcg(parts + s * partial_floats(plan.columns, D) + plan.columns * D + column));
#pragma unroll 4
      for (int s = 0; s < plan.splits; ++s) {
        const float* x = parts + s * partial_floats(plan.columns, D);
        const float weight = exp2_fast(__ldcg(x + plan.columns * D + column) - most);
        total = fmaf(__ldcg(x + plan.columns * D + 8 + column), weight, total);
        add(sum, __ldcg(reinterpret_cast<const float4*>(x + column * D + c)), weight);
      }
      store_output(column, c, sum, total);
    }
  }
};

}  // namespace vkvx
