// Decode attention: calls of at most 8 positions over packed groups, 16-bit text rows and the call's own tokens, in one launch.
//
// A block of four warps takes one KV head of one row, at most `Engine::kColumns` query vectors of it, and one of `splits` parts of what is
// cached. Everything cached is laid out as a list of units: tiles of 128 visual tokens, text rows by 16, and the own tokens. Units have costs in
// bytes, and each warp of each part takes the units that start in its share of the total: shares follow the counts on the device, the grid only the
// shapes. Warps work alone, each with its own buffers, and fold their results into shared memory at group ends; the last block
// of a row and head to arrive combines the parts.
#pragma once

#include "decode_rows.cuh"

namespace vkvx {

constexpr int kWarps = 4;

// How a decode is laid out in workspace, the same for the host and the kernels.
struct DecodePlan {
  int splits;        // parts of the sequence
  int column_tiles;  // ceil(query heads of a KV head * S / columns)
  int columns;       // columns stored a warp: even
  int lookahead;     // tiles loaded ahead
  int* arrived;      // [B * Hkv * column_tiles] counters, zero between calls
  float* partial;    // per (row, head, column tile, part): [columns][D] sums, then most[8], total[8]
  float2* extremes;  // affine: per (row, head, column tile, part, column): least and greatest score
};

__host__ __device__ __forceinline__ int partial_floats(int columns, int dim) { return columns * dim + 16; }

// Shared memory of a block, in bytes from its start.
struct DecodeLayout {
  int queries, raw_queries, starts, affine, warps, warp_bytes, total;
  int keys, values, params, sums, scalars;  // from the start of a warp's part

  __host__ __device__ DecodeLayout(int key_planes, int value_planes, int dim, int query_columns, int columns, int lookahead, int groups) {
    auto align = [](int x) { return (x + 127) & ~127; };
    queries = 0;
    raw_queries = align(queries + query_columns * (dim + dim / 8) * 4);
    starts = align(raw_queries + query_columns * (dim + 8) * 2);
    affine = align(starts + (groups + 2) * 4);
    warps = align(affine + 8 * 8);
    keys = 0;
    values = keys + lookahead * key_planes * dim * 16;
    params = align(values + lookahead * value_planes * dim * 16);
    // The same buffers hold text rows later.
    const int tiles_end = params + (lookahead + 1) * 10 * dim, rows_end = 2 * kRowsAtOnce * dim * 2;
    sums = align(tiles_end > rows_end ? tiles_end : rows_end);
    scalars = align(sums + dim * columns * 4);
    warp_bytes = align(scalars + 16 * 4);
    total = warps + kWarps * warp_bytes;
  }
};

// Walks the tiles of a slot's groups in order.
struct TileCursor {
  const int* starts;  // [groups + 1], first tile of each group in the list
  int tile = 0, group = 0, ordinal = 0;

  __device__ __forceinline__ void start(const int* s, int first) {
    starts = s;
    tile = first;
    while (starts[group + 1] <= tile) ++group;
  }
  // Step to the next tile; true if it is of another group.
  __device__ __forceinline__ bool next() {
    ++tile;
    if (tile < starts[group + 1]) return false;
    ++group;
    ++ordinal;
    return true;
  }
};

template <class Engine, bool kScan, int kLookahead>
__global__ void __launch_bounds__(kWarps * 32, Engine::kBlocks) decode_kernel(const __grid_constant__ VkvxParams p, const __grid_constant__ DecodePlan plan) {
#if VKVX_HAS_TENSOR_CORES
  constexpr int D = Engine::kHeadDim, KP = Engine::kKeyPlanes, VP = Engine::kValuePlanes;
  extern __shared__ __align__(128) char shared[];
  __shared__ unsigned tokens;
  __shared__ bool last;
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(kFull, tid >> 5, 0);
  const int part = blockIdx.x % plan.splits, column_tile = blockIdx.x / plan.splits, head = blockIdx.y, b = blockIdx.z;
  const int ratio = p.query_heads / p.kv_heads, S = p.positions;
  const int first_column = column_tile * Engine::kColumns, columns = min(Engine::kColumns, ratio * S - first_column);
  const int groups = p.visual_capacity ? p.visual_capacity / p.group_size : 0;
  const DecodeLayout layout(KP, VP, D, Engine::kColumns, plan.columns, kLookahead, groups);
  const int slot = p.slot[b];
  // Of each column: its position, where its query starts, where its output does.
  __shared__ int position_of[Engine::kColumns];
  __shared__ int64_t query_at[Engine::kColumns], output_at[Engine::kColumns];
  if (tid == 0) tokens = 0;
  if (tid < columns) {
    const unsigned at = first_column + tid, h = at / S, s = at - h * S;
    position_of[tid] = s;
    query_at[tid] = b * p.query_stride[0] + (head * ratio + h) * p.query_stride[1] + s * p.query_stride[2];
    output_at[tid] = ((static_cast<int64_t>(b) * p.query_heads + head * ratio + h) * S + s) * D;
  }
  if (slot < 0) {
    __syncthreads();
    if (!kScan && part == 0)
      for (int i = tid; i < columns * D; i += blockDim.x) store_float(p.output, output_at[i / D] + i % D, p.dtype, 0.0f);
    return;
  }
  float* queries = reinterpret_cast<float*>(shared + layout.queries);
  uint16_t* raw_queries = reinterpret_cast<uint16_t*>(shared + layout.raw_queries);
  int* starts = reinterpret_cast<int*>(shared + layout.starts);
  float2* affine = reinterpret_cast<float2*>(shared + layout.affine);
  const int* counts = p.visual_count + static_cast<int64_t>(slot) * groups;
  const int text_count = p.text_count[slot];
  if (warp == 0) {  // first tile of each group
    int before = 0;
    for (int base = 0; base < groups; base += 32) {
      const int count = base + lane < groups ? counts[base + lane] : 0;
      int x = (count + kTile - 1) / kTile;
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        const int y = __shfl_up_sync(kFull, x, o);
        if (lane >= o) x += y;
      }
      if (base + lane < groups) starts[base + lane + 1] = before + x;
      before += __shfl_sync(kFull, x, 31);
    }
    if (lane == 0) starts[0] = 0;
  }
  __syncthreads();
  // Queries into shared memory; those of positions that are no tokens, which hold anything, as 0.
  const float factor = p.scale * kLog2e;
  auto load_queries = [&]() {
    collect_tokens(p, b, &tokens);
    __syncthreads();
    for (int i = tid; i < Engine::kColumns * D; i += blockDim.x) {
      const int column = i / D, c = i % D;
      uint16_t raw = 0;
      float x = 0.0f;
      if (column < columns && tokens >> position_of[column] & 1) {
        raw = static_cast<const uint16_t*>(p.query)[query_at[column] + c];
        x = p.dtype == VKVX_BFLOAT16 ? __uint_as_float(static_cast<uint32_t>(raw) << 16) : __half2float(__ushort_as_half(raw));
      }
      raw_queries[column * (D + 8) + c] = raw;
      queries[column * (D + D / 8) + c + 4 * (c >> 5)] = x * factor;
    }
  };
  const int64_t tile_id = (static_cast<int64_t>(b) * p.kv_heads + head) * plan.column_tiles + column_tile;
  const bool is_affine = p.correction == VKVX_CORRECTION_AFFINE && starts[groups] > 0;
  if (!kScan && is_affine && tid < 8) {
    float2 all = make_float2(INFINITY, -INFINITY);
    for (int s = 0; s < plan.splits; ++s) {
      const float2 x = plan.extremes[(tile_id * plan.splits + s) * 8 + tid];
      all = make_float2(fminf(all.x, x.x), fmaxf(all.y, x.y));
    }
    const float slope = all.y > all.x ? fmaxf(0.0f, (all.y - p.tau * kLog2e - all.x) / (all.y - all.x)) : 1.0f;
    affine[tid] = make_float2(slope, all.x * (1.0f - slope));
  }

  // This warp's share of the units.
  char* mine = shared + layout.warps + warp * layout.warp_bytes;
  const int visual_cost = KP + VP, row_cost = 4;
  const int visual_units = starts[groups], row_units = kScan ? 0 : (text_count + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t cost = static_cast<int64_t>(visual_units) * visual_cost + (row_units + (kScan ? 0 : 1)) * row_cost;
  const int share = part * kWarps + warp, shares = plan.splits * kWarps;
  const int64_t low = cost * share / shares, high = cost * (share + 1) / shares;
  const int64_t visual_end = static_cast<int64_t>(visual_units) * visual_cost;
  // First unit of a kind that starts at or past a cost, when units of that kind start at `base`.
  auto first_unit = [](int64_t at, int64_t base, int unit_cost, int units) {
    const int64_t n = at <= base ? 0 : divide_up(at - base, unit_cost);
    return static_cast<int>(n < units ? n : units);
  };
  const int tile_begin = first_unit(low, 0, visual_cost, visual_units), tile_end = first_unit(high, 0, visual_cost, visual_units);
  const int row_begin = first_unit(low, visual_end, row_cost, row_units + 1), row_end = first_unit(high, visual_end, row_cost, row_units + 1);

  WarpResult result;
  result.sums = reinterpret_cast<float*>(mine + layout.sums);
  result.most = reinterpret_cast<float*>(mine + layout.scalars);
  result.total = result.most + 8;
  result.columns = plan.columns;
  result.empty = true;
  float low_score[2] = {INFINITY, INFINITY}, high_score[2] = {-INFINITY, -INFINITY};

  const bool has_tiles = uniform(tile_begin < tile_end);
  {
    const int tiles_of_group = p.group_size / kTile;
    const int64_t slot_head = static_cast<int64_t>(slot) * p.kv_heads + head;
    const int* keys = p.visual_key + slot_head * (p.visual_capacity / kTile) * KP * D * 4;
    const int* values = p.visual_value + slot_head * (p.visual_capacity / kTile) * VP * D * 4;
    const __half* key_params = static_cast<const __half*>(p.visual_key_params) + slot_head * groups * 3 * D;
    const __half* value_params = static_cast<const __half*>(p.visual_value_params) + slot_head * groups * 2 * D;
    TileCursor load_cursor, value_cursor, cursor;
    if (has_tiles) load_cursor.start(starts, tile_begin);
    value_cursor = cursor = load_cursor;
    auto tile_index = [&](const TileCursor& c) { return static_cast<int64_t>(c.group) * tiles_of_group + c.tile - starts[c.group]; };
    int key_stage = 0, value_stage = 0;  // of the next load
    bool new_group = true;
    auto load_keys = [&]() {
      if (load_cursor.tile < tile_end) {
        const char* from = reinterpret_cast<const char*>(keys + tile_index(load_cursor) * KP * D * 4);
        const uint32_t to = shared_address(mine + layout.keys) + key_stage * KP * D * 16;
#pragma unroll
        for (int i = 0; i < KP * D / 32; ++i) {
          const int c = (i * 32 + lane) % D, plane = (i * 32 + lane) / D;
          copy_async(to + (plane * D + Engine::place_key_chunk(c)) * 16, from + (i * 32 + lane) * 16);
        }
        if (new_group) {
          const uint32_t at = shared_address(mine + layout.params) + load_cursor.ordinal % (kLookahead + 1) * 10 * D;
          const char* k = reinterpret_cast<const char*>(key_params + static_cast<int64_t>(load_cursor.group) * 3 * D);
          const char* v = reinterpret_cast<const char*>(value_params + static_cast<int64_t>(load_cursor.group) * 2 * D);
          for (int i = lane; i < 6 * D / 16; i += 32) copy_async(at + i * 16, k + i * 16);
          for (int i = lane; i < 4 * D / 16; i += 32) copy_async(at + 6 * D + i * 16, v + i * 16);
        }
        new_group = load_cursor.next();
      }
      copy_commit();
      key_stage = key_stage + 1 == kLookahead ? 0 : key_stage + 1;
    };
    auto load_values = [&]() {
      if (!kScan && value_cursor.tile < tile_end) {
        const char* from = reinterpret_cast<const char*>(values + tile_index(value_cursor) * VP * D * 4);
        const uint32_t to = shared_address(mine + layout.values) + value_stage * VP * D * 16;
#pragma unroll
        for (int i = 0; i < VP * D / 32; ++i) copy_async(to + (i * 32 + lane) * 16, from + (i * 32 + lane) * 16);
        value_cursor.next();
      }
      copy_commit();
      value_stage = value_stage + 1 == kLookahead ? 0 : value_stage + 1;
    };
#pragma unroll
    for (int i = 0; i < kLookahead; ++i) {
      if (has_tiles) {
        load_keys();
        load_values();
      }
    }
    load_queries();
    __syncthreads();
    Engine engine;
    auto params_of = [&](int ordinal) { return reinterpret_cast<const __half*>(mine + layout.params + ordinal % (kLookahead + 1) * 10 * D); };
    bool starts_group = true;
    while (has_tiles && uniform(cursor.tile < tile_end)) {
      copy_wait<2 * kLookahead - 1>();
      __syncwarp();
      if (uniform(starts_group)) {
        engine.start_group(params_of(cursor.ordinal), queries, D + D / 8, p.correction, p.correction_limit, !kScan && is_affine ? affine : nullptr);
        engine.start_segment();
      }
      const int valid = min(kTile, counts[cursor.group] - (cursor.tile - starts[cursor.group]) * kTile);
      engine.scores(shared_address(mine + layout.keys) + key_stage * KP * D * 16);
      __syncwarp();
      load_keys();
      if constexpr (kScan) {
        float lo[2], hi[2];
        engine.extremes(valid, lo, hi);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          low_score[c] = fminf(low_score[c], lo[c]);
          high_score[c] = fmaxf(high_score[c], hi[c]);
        }
      } else {
        engine.softmax(valid);
      }
      copy_wait<2 * kLookahead - 1>();
      __syncwarp();
      if constexpr (!kScan) engine.values(shared_address(mine + layout.values) + value_stage * VP * D * 16);
      __syncwarp();
      load_values();
      const int ordinal = cursor.ordinal;
      starts_group = cursor.next();
      if constexpr (!kScan)
        if (uniform(starts_group || cursor.tile == tile_end)) engine.end_segment(result, params_of(ordinal) + 3 * D);
    }
    copy_wait<0>();
    __syncwarp();
  }

  if constexpr (kScan) {
    float2* found = reinterpret_cast<float2*>(mine + layout.keys);
    if (lane < 4) {
      found[2 * lane] = make_float2(low_score[0], high_score[0]);
      found[2 * lane + 1] = make_float2(low_score[1], high_score[1]);
    }
    __syncthreads();
    if (tid < 8) {
      float2 all = make_float2(INFINITY, -INFINITY);
      for (int w = 0; w < kWarps; ++w) {
        const float2 x = reinterpret_cast<const float2*>(shared + layout.warps + w * layout.warp_bytes + layout.keys)[tid];
        all = make_float2(fminf(all.x, x.x), fmaxf(all.y, x.y));
      }
      plan.extremes[(tile_id * plan.splits + part) * 8 + tid] = all;
    }
    return;
  } else {
    if (uniform(row_begin < row_end)) {
      RowsEngine<D> rows;
      rows.start(raw_queries, Engine::kColumns);
      const int t = lane & 3;
      const uint32_t buffer = shared_address(mine);
      const int64_t row_bytes = 2 * D, slot_head = static_cast<int64_t>(slot) * p.kv_heads + head;
      RowSource source{static_cast<const char*>(p.text_key) + slot_head * p.text_capacity * row_bytes,
                       static_cast<const char*>(p.text_value) + slot_head * p.text_capacity * row_bytes, row_bytes, row_bytes};
      uint32_t seen[2] = {kFull, kFull};
      for (int unit = row_begin; unit < row_end; ++unit) {
        int first = unit * kRowsAtOnce;
        uint32_t present = unit == row_units ? tokens : kFull >> (32 - min(kRowsAtOnce, text_count - first));
        if (unit == row_units) {  // the own tokens
          source = {static_cast<const char*>(p.key) + (b * p.key_stride[0] + head * p.key_stride[1]) * 2,
                    static_cast<const char*>(p.value) + (b * p.value_stride[0] + head * p.value_stride[1]) * 2, p.key_stride[2] * 2, p.value_stride[2] * 2};
          first = 0;
#pragma unroll
          for (int c = 0; c < 2; ++c) seen[c] = 2 * t + c < columns ? (2u << position_of[2 * t + c]) - 1 : kFull;
        }
        if (p.dtype == VKVX_BFLOAT16)
          rows.template attend<true>(source, first, present, seen, factor, buffer);
        else
          rows.template attend<false>(source, first, present, seen, factor, buffer);
      }
      rows.finish(result);
    }
    // Combine the warps, then the parts.
    if (lane < 8 && result.empty) {
      result.most[lane] = -1e30f;
      result.total[lane] = 0.0f;
    }
    __syncthreads();
    auto scalars_of = [&](int w) { return reinterpret_cast<const float*>(shared + layout.warps + w * layout.warp_bytes + layout.scalars); };
    float* partial = plan.partial + (tile_id * plan.splits + part) * partial_floats(plan.columns, D);
    for (int i = tid; i < columns * D; i += blockDim.x) {
      const int column = i / D, c = i % D;
      float most = -1e30f, total = 0.0f, sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) most = fmaxf(most, scalars_of(w)[column]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float weight = exp2_fast(scalars_of(w)[column] - most), l = scalars_of(w)[8 + column];
        total = fmaf(l, weight, total);
        if (l > 0.0f) sum = fmaf(reinterpret_cast<const float*>(shared + layout.warps + w * layout.warp_bytes + layout.sums)[c * plan.columns + column], weight, sum);
      }
      if (plan.splits == 1) {
        const bool token = tokens >> position_of[column] & 1;
        store_float(p.output, output_at[column] + c, p.dtype, token ? sum / total : 0.0f);
      } else {
        partial[i] = sum;
        if (c == 0) {
          partial[plan.columns * D + column] = most;
          partial[plan.columns * D + 8 + column] = total;
        }
      }
    }
    if (plan.splits == 1) return;
    __threadfence();
    __syncthreads();
    if (tid == 0) last = atomicAdd(plan.arrived + tile_id, 1) == plan.splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (tid == 0) plan.arrived[tile_id] = 0;
    const float* parts = plan.partial + tile_id * plan.splits * partial_floats(plan.columns, D);
    for (int i = tid; i < columns * D; i += blockDim.x) {
      const int column = i / D, c = i % D;
      float most = -1e30f, total = 0.0f, sum = 0.0f;
      for (int s = 0; s < plan.splits; ++s) {
        const float* x = parts + s * partial_floats(plan.columns, D);
        const float m = __ldcg(x + plan.columns * D + column), now = fmaxf(most, m);
        const float fade = exp2_fast(most - now), weight = exp2_fast(m - now);
        total = fmaf(__ldcg(x + plan.columns * D + 8 + column), weight, total * fade);
        sum = fmaf(__ldcg(x + i), weight, sum * fade);
        most = now;
      }
      const bool token = tokens >> position_of[column] & 1;
      store_float(p.output, output_at[column] + c, p.dtype, token ? sum / total : 0.0f);
    }
  }
#endif
}

}  // namespace vkvx
