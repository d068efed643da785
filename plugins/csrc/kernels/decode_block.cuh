// A block of the decode kernel: what it works on, and its steps but for the loop over tiles.
#pragma once

#include "cluster.cuh"
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
  const DecodeLayout& layout;
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
        part(plan.column_tiles == 1 ? blockIdx.x : blockIdx.x % plan.splits),
        column_tile(plan.column_tiles == 1 ? 0 : blockIdx.x / plan.splits),
        head(blockIdx.y),
        b(blockIdx.z),
        ratio(plan.ratio),
        S(p.positions),
        first_column(column_tile * kColumns),
        columns(min(kColumns, ratio * S - first_column)),
        groups(plan.groups),
        layout(plan.layout),
        queries(reinterpret_cast<float*>(shared + layout.queries)),
        raw_queries(reinterpret_cast<uint16_t*>(shared + layout.raw_queries)),
        starts(reinterpret_cast<int*>(shared + layout.starts)),
        affine(reinterpret_cast<float2*>(shared + layout.affine)) {}

  __device__ __forceinline__ char* memory_of(int w) const {
    return shared + layout.warps + w * layout.warp_bytes;
  }

  // Where this block has what part s found in the columns that this block combines. The parts of a
  // cluster write there, which takes one barrier, and no block waits for others to read.
  __device__ __forceinline__ float* incoming_of(int s) const {
    return reinterpret_cast<float*>(shared + layout.incoming) + s * partial_floats(plan.columns, D);
  }

  // Query head and position of a column.
  __device__ __forceinline__ void locate(int column, int& h, int& s) const {
    const unsigned at = first_column + column;
    h = S == 1 ? at : at / S;
    s = at - h * S;
  }

  // The counts of a slot lie behind its number: where those of all slots are few, they come on
  // their way while it does.
  __device__ __forceinline__ void prefetch_counts() const {
    if (warp != 1 || !plan.prefetches) return;  // warp 0 has them to read
    constexpr int kLine = 32;                   // counts
#pragma unroll 1
    for (int i = lane * kLine; i < p.slots * groups; i += 32 * kLine) prefetch(p.visual_count + i);
#pragma unroll 1
    for (int i = lane * kLine; i < p.slots; i += 32 * kLine) prefetch(p.text_count + i);
  }

  // Sends the queries on their way into shared memory, by chunks of 8 channels.
  __device__ __forceinline__ void stage_queries() const {
    const int chunks = D / 8;
#pragma unroll 1
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
      const int column = Engine::column();
      engine.first_seen = column < columns ? start_of(0, position_of[column]) : 0;
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
#pragma unroll 1
    for (int s = 0; s < plan.splits; ++s) {
      const float2 x = plan.extremes[(tile_id * plan.splits + s) * 8 + tid];
      all = make_float2(fminf(all.x, x.x), fmaxf(all.y, x.y));
    }
    const float slope =
        all.y > all.x ? fmaxf(0.0f, (all.y - p.tau * kLog2e - all.x) / (all.y - all.x)) : 1.0f;
    affine[tid] = make_float2(slope, all.x * (1.0f - slope));
  }

  // First unit of a kind that starts at or past a cost, when units of that kind start at `base`.
  static __device__ __forceinline__ int first_unit(int at, int base, int unit_cost, int units) {
    const unsigned n = at <= base ? 0 : (at - base + unit_cost - 1u) / unit_cost;
    return min(n, static_cast<unsigned>(units));
  }

  // Where the share of a warp begins in the cost of all units.
  __device__ __forceinline__ int start_of_share(int cost, unsigned share) const {
    return share == plan.splits * warps
               ? cost
               : static_cast<int>(static_cast<uint64_t>(cost) * (share * plan.share) >> 32);
  }

  // This warp's share of the units.
  __device__ __forceinline__ WarpShare share_units(int text_count) const {
    // In multiples of 16 D bytes; the arithmetic of a tile is worth some more.
    const int visual_cost = key_planes + value_planes + 2, row_cost = 4;
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
    const int visual_end = visual_units * visual_cost,
              cost = visual_end + (row_units + (kScan ? 0 : 1)) * row_cost;
    const unsigned share = part * warps + warp;
    const int low = start_of_share(cost, share), high = start_of_share(cost, share + 1);
    // Starting and ending a group costs some tiles of few bits: shares of whole groups, if they are
    // not far from even ones.
    const bool snaps = Engine::kSnaps && start_of_share(cost, 1) >= 4 * visual_cost;
    auto first_tile = [&](int at) {
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
    if (has_tiles) loader.ahead.start(starts, share.tile_begin, plan.group_tiles);
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
#pragma unroll 1
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
    if (Engine::writes_column()) found[Engine::column()] = make_float2(engine.low, engine.high);
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
    if (plan.appends && column_tile == 0 && uniform(share.row_end > share.own_row))
      append_own(mine, text_count);
  }

  // Stores the call's text tokens, whose rows attend_rows has just had copied to the warp's memory;
  // rows of 8 bits come from the call's tensors.
  // Nothing of this launch reads the rows from `text_count` on.
  __device__ __forceinline__ void append_own(const char* mine, int text_count) const {
    using Rows = RowsEngine<Engine::kPaddedDim>;
    const int64_t first =
        (static_cast<int64_t>(slot) * p.kv_heads + head) * p.text_capacity + text_count;
#pragma unroll 1
    for (int i = 0; i < p.text_entries; ++i) {
      const int at = p.text_index[static_cast<int64_t>(b) * p.text_entries + i];
      if (at < 0) continue;
      const int row = p.key_bits == 16 ? __popc(tokens & ((1u << at) - 1)) : i;
      if (text_count + row >= p.text_capacity) continue;
      if (p.text_bits == 8) {
        append_code_row(p, true, b, head, at, first + row);
        append_code_row(p, false, b, head, at, first + row);
        continue;
      }
#pragma unroll 1
      for (int c = lane; c < D / 8; c += 32) {
        const char* from = mine + Rows::place(at, c);
        const int64_t to = (first + row) * D + 8 * c;
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.text_key) + to) =
            *reinterpret_cast<const uint4*>(from);
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.text_value) + to) =
            *reinterpret_cast<const uint4*>(from + Rows::kBytes);
      }
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
    float* partial = plan.is_clustered ? incoming_of(part)
                                       : plan.partial + (tile_id * plan.splits + part) *
                                                            partial_floats(plan.columns, D);
    if (plan.is_clustered) wait_at_cluster();  // until all blocks have started
#pragma unroll 1
    for (int i = tid; i < columns * (D / 4); i += blockDim.x) {
      const int column = i / (D / 4), c = i % (D / 4) * 4;
      float most = -1e30f, total = 0.0f;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
      for (int w = 0; w < warps; ++w) most = fmaxf(most, scalars_of(w)[column]);
#pragma unroll 2
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
        float* to = plan.is_clustered ? shared_of_block(partial, column % plan.splits) : partial;
        *reinterpret_cast<float4*>(to + column * D + c) = sum;
        if (c == 0) {
          to[plan.columns * D + column] = most;
          to[plan.columns * D + 8 + column] = total;
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

  // The output of columns first, first + step, ... from the results of the parts, one behind the
  // other.
  __device__ __forceinline__ void combine_parts(int first, int step, const float* parts) const {
    const int of_part = partial_floats(plan.columns, D);
#pragma unroll 1
    for (int i = tid;; i += blockDim.x) {
      const int column = first + i / (D / 4) * step, c = i % (D / 4) * 4;
      if (column >= columns) return;
      float most = -1e30f, total = 0.0f;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
      for (int s = 0; s < plan.splits; ++s) {
        const float* x = parts + s * of_part;
        const float here = x[plan.columns * D + column];
        const float4 sums = *reinterpret_cast<const float4*>(x + column * D + c);
        const float now = fmaxf(most, here), fade = exp2_fast(most - now),
                    weight = exp2_fast(here - now);
        total = fmaf(x[plan.columns * D + 8 + column], weight, total * fade);
        sum = make_float4(sum.x * fade, sum.y * fade, sum.z * fade, sum.w * fade);
        add(sum, sums, weight);
        most = now;
      }
      store_output(column, c, sum, total);
    }
  }

  __device__ __forceinline__ void combine_blocks(int64_t tile_id, bool& last) const {
    if (plan.splits == 1) return;
    if (plan.is_clustered) {
      arrive_at_cluster();
      wait_at_cluster();
      combine_parts(part, plan.splits, incoming_of(0));
    } else if (arrives_last(tile_id, last)) {
      combine_parts(0, 1, plan.partial + tile_id * plan.splits * partial_floats(plan.columns, D));
    }
  }
};

}  // namespace vkvx
