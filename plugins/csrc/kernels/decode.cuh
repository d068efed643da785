// Decode attention: calls of at most 8 positions over packed groups, 16-bit text rows and the call's own tokens, in one launch.
//
// A block of 1 to 8 warps takes one KV head of one row, at most `Engine::kColumns` query vectors of it, and one of `splits` parts of what is
// cached. Everything cached is laid out as a list of units: tiles of 128 visual tokens, text rows by 16, and the own tokens. Units have costs in
// bytes, and each warp of each part takes the units that start in its share of the total: shares follow the counts on the device, the grid only the
// shapes. Warps work alone, each with its own buffers, and fold their results into shared memory at group ends; the last block
// of a row and head to arrive combines the parts.
#pragma once

#include "decode_rows.cuh"

namespace vkvx {


// How a decode is laid out in workspace, the same for the host and the kernels.
struct DecodePlan {
  int splits;        // parts of the sequence
  int column_tiles;  // ceil(query heads of a KV head * S / columns)
  int columns;       // columns stored a warp
  int warps;         // of a block
  int* arrived;      // [B * Hkv * column_tiles] counters, zero between calls
  float* partial;    // per (row, head, column tile, part): [columns][D] sums, then most[8], total[8]
  float2* extremes;  // affine: per (row, head, column tile, part, column): least and greatest score
};

__host__ __device__ __forceinline__ int partial_floats(int columns, int dim) { return columns * dim + 16; }

// Shared memory of a block, in bytes from its start.
struct DecodeLayout {
  int queries, raw_queries, starts, affine, warps, warp_bytes, total;
  int keys, values, params, sums, scalars;  // from the start of a warp's part

  __host__ __device__ DecodeLayout(int key_planes, int value_planes, int dim, int padded_dim, int query_columns, int columns, int lookahead, int groups,
                                   int warp_count) {
    auto align = [](int x) { return (x + 127) & ~127; };
    queries = 0;
    raw_queries = align(queries + query_columns * (dim + dim / 8) * 4);
    starts = align(raw_queries + query_columns * (dim + 8) * 2);
    affine = align(starts + (2 * groups + 2) * 4);
    warps = align(affine + 8 * 8);
    keys = 0;
    values = keys + lookahead * key_planes * dim * 16;
    params = align(values + lookahead * value_planes * dim * 16);
    // The same buffers hold text rows later.
    const int tiles_end = params + (lookahead + 1) * 10 * dim, rows_end = 2 * kRowsAtOnce * padded_dim * 2;
    sums = align(tiles_end > rows_end ? tiles_end : rows_end);
    scalars = align(sums + sums_stride(padded_dim) * columns * 4);
    warp_bytes = align(scalars + 16 * 4);
    total = warps + warp_count * warp_bytes;
  }

  static __host__ __device__ int sums_stride(int padded_dim) { return padded_dim + 4; }
};

// Walks the tiles of a slot's groups in order.
struct TileCursor {
  const int* starts;       // [groups + 1], first tile of each group in the list
  int tiles_of_group;      // in the cache
  int tile, group, end;    // the group's end in the list
  int place;               // of the tile in the cache
  int ordinal = 0;         // groups before this one

  __device__ __forceinline__ void start(const int* s, int first, int group_tiles) {
    starts = s;
    tiles_of_group = group_tiles;
    tile = first;
    group = 0;
    while (starts[group + 1] <= tile) ++group;
    end = starts[group + 1];
    place = group * tiles_of_group + tile - starts[group];
  }
  // Step to the next tile; true if it is of another group. Past the last tile only `tile` means anything.
  __device__ __forceinline__ bool next() {
    ++tile;
    ++place;
    if (tile < end) return false;
    ++group;
    ++ordinal;
    end = starts[group + 1];
    place = group * tiles_of_group;
    return true;
  }
};

template <class Engine, bool kScan, int kLookahead>
__global__ void __launch_bounds__(Engine::kWarps * 32, Engine::kBlocks) decode_kernel(const __grid_constant__ VkvxParams p, const __grid_constant__ DecodePlan plan) {
#if VKVX_HAS_TENSOR_CORES
  // Numbers of planes; without pictures (16 bits) any will do.
  const int D = Engine::kAny ? p.head_dim : Engine::kPaddedDim;
  const int KP = Engine::kAny ? min(p.key_bits, 8) : Engine::kPlanes, VP = Engine::kAny ? min(p.value_bits, 8) : Engine::kPlanes;
  extern __shared__ __align__(128) char shared[];
  __shared__ unsigned tokens;
  __shared__ bool last;
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(kFull, tid >> 5, 0), warps = blockDim.x / 32;
  const int part = blockIdx.x % plan.splits, column_tile = blockIdx.x / plan.splits, head = blockIdx.y, b = blockIdx.z;
  const int ratio = p.query_heads / p.kv_heads, S = p.positions;
  const int first_column = column_tile * Engine::kColumns, columns = min(Engine::kColumns, ratio * S - first_column);
  const int groups = p.visual_capacity ? p.visual_capacity / p.group_size : 0;
  const DecodeLayout layout(KP, VP, D, Engine::kPaddedDim, Engine::kColumns, plan.columns, kLookahead, groups, warps);
  float* queries = reinterpret_cast<float*>(shared + layout.queries);
  uint16_t* raw_queries = reinterpret_cast<uint16_t*>(shared + layout.raw_queries);
  int* starts = reinterpret_cast<int*>(shared + layout.starts);
  int* group_counts = starts + groups + 2;
  float2* affine = reinterpret_cast<float2*>(shared + layout.affine);
  wait_for_earlier_kernels();
  let_next_kernel_start();
  const int slot = p.slot[b];
  // Queries on their way into shared memory, by chunks of 8 channels.
  auto place_of = [&](int column, int& h, int& s) {
    const unsigned at = first_column + column;
    h = S == 1 ? at : at / S;
    s = at - h * S;
  };
  const int chunks = D / 8;
  for (int i = tid; i < Engine::kColumns * chunks; i += blockDim.x) {
    const int column = i / chunks, c = i % chunks * 8;
    const bool exists = column < columns;
    int h, s;
    place_of(exists ? column : 0, h, s);
    const int64_t at = b * p.query_stride[0] + (head * ratio + h) * p.query_stride[1] + s * p.query_stride[2] + c;
    copy_async(shared_address(raw_queries + column * (D + 8) + c), static_cast<const uint16_t*>(p.query) + at, exists);
  }
  copy_commit();
  // Of each column: its position, where its output starts.
  __shared__ int position_of[Engine::kColumns];
  __shared__ int64_t output_at[Engine::kColumns];
  if (tid < columns) {
    int h, s;
    place_of(tid, h, s);
    position_of[tid] = s;
    output_at[tid] = ((static_cast<int64_t>(b) * p.query_heads + head * ratio + h) * S + s) * D;
  }
  if (warp == warps - 1) {
    const unsigned found = collect_tokens(p, b);
    if (lane == 0) tokens = found;
  }
  if (slot < 0) {
    copy_wait<0>();
    __syncthreads();
    if (!kScan && part == 0)
      for (int i = tid; i < columns * (D / 4); i += blockDim.x)
        store_four(p.output, output_at[i / (D / 4)] + i % (D / 4) * 4, p.dtype, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    return;
  }
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
      if (base + lane < groups) {
        starts[base + lane + 1] = before + x;
        group_counts[base + lane] = count;
      }
      before += __shfl_sync(kFull, x, 31);
    }
    if (lane == 0) starts[0] = 0;
  }
  __syncthreads();
  // Queries of positions that are no tokens hold anything, and become 0. A thread converts what it copied.
  const float factor = p.scale * kLog2e;
  auto convert_queries = [&]() {
    for (int i = tid; i < Engine::kColumns * chunks; i += blockDim.x) {
      const int column = i / chunks, c = i % chunks * 8;
      uint4* raw = reinterpret_cast<uint4*>(raw_queries + column * (D + 8) + c);
      uint4 packed = *raw;
      if (column >= columns || !(tokens >> position_of[column] & 1)) *raw = packed = make_uint4(0, 0, 0, 0);
      float4* to = reinterpret_cast<float4*>(queries + column * (D + D / 8) + c + 4 * (c >> 5));
      const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
      float2 x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        x[k] = p.dtype == VKVX_BFLOAT16 ? make_float2(__uint_as_float(pairs[k] << 16), __uint_as_float(pairs[k] & 0xffff0000u))
                                        : __half22float2(reinterpret_cast<const __half2&>(pairs[k]));
      }
      to[0] = make_float4(x[0].x * factor, x[0].y * factor, x[1].x * factor, x[1].y * factor);
      to[1] = make_float4(x[2].x * factor, x[2].y * factor, x[3].x * factor, x[3].y * factor);
    }
  };
  const int64_t tile_id = (static_cast<int64_t>(b) * p.kv_heads + head) * plan.column_tiles + column_tile;
  const bool is_affine = p.correction == VKVX_CORRECTION_AFFINE && starts[groups] > 0;
  if (!kScan && is_affine && tid < Engine::kColumns) {
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
  const int share = part * warps + warp, shares = plan.splits * warps;
  const int64_t low = cost * share / shares, high = cost * (share + 1) / shares;
  const int64_t visual_end = static_cast<int64_t>(visual_units) * visual_cost;
  // First unit of a kind that starts at or past a cost, when units of that kind start at `base`.
  auto first_unit = [](int64_t at, int64_t base, int unit_cost, int units) {
    const int64_t n = at <= base ? 0 : divide_up(at - base, unit_cost);
    return static_cast<int>(n < units ? n : units);
  };
  // Starting and ending a group costs some tiles of few bits: shares of whole groups, if they are not far from even ones.
  const bool snaps = Engine::kSnaps && cost >= static_cast<int64_t>(4 * visual_cost) * shares;
  auto first_tile = [&](int64_t at) {
    const int tile = first_unit(at, 0, visual_cost, visual_units);
    if (!snaps || tile == visual_units) return tile;
    int group = 0;
    while (starts[group + 1] <= tile) ++group;
    return tile - starts[group] == 1 ? tile - 1 : tile > starts[group] && starts[group + 1] - tile == 1 ? tile + 1 : tile;
  };
  const int tile_begin = first_tile(low), tile_end = first_tile(high);
  const int row_begin = first_unit(low, visual_end, row_cost, row_units + 1), row_end = first_unit(high, visual_end, row_cost, row_units + 1);

  WarpResult result;
  result.sums = reinterpret_cast<float*>(mine + layout.sums);
  result.most = reinterpret_cast<float*>(mine + layout.scalars);
  result.total = result.most + 8;
  result.columns = plan.columns;
  result.stride = DecodeLayout::sums_stride(Engine::kPaddedDim);
  result.empty = true;
  Engine engine(p);

  const bool has_tiles = uniform(tile_begin < tile_end);
  {
    const int tiles_of_group = p.group_size / kTile;
    const int64_t slot_head = static_cast<int64_t>(slot) * p.kv_heads + head;
    const int* keys = p.visual_key + slot_head * (p.visual_capacity / kTile) * KP * D * 4;
    const int* values = p.visual_value + slot_head * (p.visual_capacity / kTile) * VP * D * 4;
    const __half* key_params = static_cast<const __half*>(p.visual_key_params) + slot_head * groups * 3 * D;
    const __half* value_params = static_cast<const __half*>(p.visual_value_params) + slot_head * groups * 2 * D;
    TileCursor ahead{}, cursor{};
    ahead.tile = tile_begin;
    if (has_tiles) ahead.start(starts, tile_begin, tiles_of_group);
    cursor = ahead;
    int stage = 0, load_stage = 0;
    bool new_group = true;
    // Chunk c of 16 bytes of a plane goes to place c ^ (c / (D / 8) & 7): rows that a load takes together lie D / 8 chunks apart, and so in different banks.
    const int any_reciprocal = Engine::kAny ? 524288 / D + 1 : 0;
    auto copy_planes = [&](uint32_t to, const int* from, int planes) {
      const char* at = reinterpret_cast<const char*>(from);
      if constexpr (Engine::kAny) {
#pragma unroll 1
        for (int i = lane; i < D; i += 32) {
          const int place = (i ^ (i * any_reciprocal >> 16 & 7)) * 16;
          for (int plane = 0; plane < planes; ++plane) copy_async(to + plane * D * 16 + place, at + (plane * D + i) * 16);
        }
      } else {
        // Four rows of 8 chunks at a time, so that all addresses are two sums and constants.
        constexpr int kRow = 2 * Engine::kPaddedDim;  // bytes
        at += (lane >> 3) * kRow + (lane & 7) * 16;
        const uint32_t even = to + (lane >> 3) * kRow + ((lane & 7) ^ (lane >> 3)) * 16, odd = even ^ 64;
#pragma unroll
        for (int plane = 0; plane < Engine::kPlanes; ++plane)
#pragma unroll
          for (int i = 0; i < Engine::kPaddedDim / 32; ++i) {
            const int offset = plane * Engine::kPaddedDim * 16 + (i & 1) * 4 * kRow + (i >> 1) * 128;
            copy_async((i & 1 ? odd : even) + offset, at + offset);
          }
      }
    };
    const uint32_t key_buffer = shared_address(mine + layout.keys), value_buffer = shared_address(mine + layout.values);
    // Keys of the tile `ahead`, then its values, which step to the next one.
    auto load_keys = [&]() {
      if (ahead.tile < tile_end) {
        copy_planes(key_buffer + load_stage * KP * D * 16, keys + static_cast<int64_t>(ahead.place) * KP * D * 4, KP);
        if (new_group) {
          const uint32_t at = shared_address(mine + layout.params) + ahead.ordinal % (kLookahead + 1) * 10 * D;
          const char* k = reinterpret_cast<const char*>(key_params + static_cast<int64_t>(ahead.group) * 3 * D);
          const char* v = reinterpret_cast<const char*>(value_params + static_cast<int64_t>(ahead.group) * 2 * D);
          for (int i = lane; i < 6 * D / 16; i += 32) copy_async(at + i * 16, k + i * 16);
          for (int i = lane; i < 4 * D / 16; i += 32) copy_async(at + 6 * D + i * 16, v + i * 16);
        }
      }
      copy_commit();
    };
    auto load_values = [&]() {
      if (ahead.tile < tile_end) {
        if constexpr (!kScan) copy_planes(value_buffer + load_stage * VP * D * 16, values + static_cast<int64_t>(ahead.place) * VP * D * 4, VP);
        new_group = ahead.next();
      }
      copy_commit();
      load_stage = load_stage + 1 == kLookahead ? 0 : load_stage + 1;
    };
#pragma unroll
    for (int i = 0; i < kLookahead; ++i) {
      load_keys();
      load_values();
    }
    copy_wait<2 * kLookahead>();
    convert_queries();
    __syncthreads();
    auto params_of = [&](int ordinal) { return reinterpret_cast<const __half*>(mine + layout.params + ordinal % (kLookahead + 1) * 10 * D); };
    bool starts_group = true;
    int left = has_tiles ? group_counts[cursor.group] - (cursor.tile - starts[cursor.group]) * kTile : 0;  // tokens of the group from this tile on
    while (has_tiles && uniform(cursor.tile < tile_end)) {
      copy_wait<2 * kLookahead - 1>();
      __syncwarp();
      if (uniform(starts_group)) {
        engine.start_group(params_of(cursor.ordinal), queries, D + D / 8, p.correction, p.correction_limit, !kScan && is_affine ? affine : nullptr);
        engine.start_segment();
      }
      const int valid = min(kTile, left);
      engine.scores(key_buffer + stage * KP * D * 16);
      __syncwarp();
      load_keys();
      if constexpr (kScan) {
        engine.extremes(valid);
      } else {
        engine.softmax(valid, [&]() { engine.end_segment(result, params_of(cursor.ordinal) + 3 * D); });
      }
      copy_wait<2 * kLookahead - 1>();
      __syncwarp();
      if constexpr (!kScan) engine.values(value_buffer + stage * VP * D * 16);
      __syncwarp();
      load_values();
      stage = stage + 1 == kLookahead ? 0 : stage + 1;
      const int ordinal = cursor.ordinal;
      starts_group = cursor.next();
      left -= kTile;
      if (uniform(starts_group || cursor.tile == tile_end)) {
        if constexpr (!kScan) engine.end_segment(result, params_of(ordinal) + 3 * D);
        if (starts_group && cursor.tile < tile_end) left = group_counts[cursor.group];
      }
    }
    copy_wait<0>();
    __syncwarp();
  }

  if constexpr (kScan) {
    float2* found = reinterpret_cast<float2*>(mine + layout.keys);
#pragma unroll
    for (int set = 0; set < Engine::kColumns / 4; ++set)
      if (lane < 4) found[4 * set + lane] = make_float2(engine.low[set], engine.high[set]);
    __syncthreads();
    if (tid < Engine::kColumns) {
      float2 all = make_float2(INFINITY, -INFINITY);
      for (int w = 0; w < warps; ++w) {
        const float2 x = reinterpret_cast<const float2*>(shared + layout.warps + w * layout.warp_bytes + layout.keys)[tid];
        all = make_float2(fminf(all.x, x.x), fmaxf(all.y, x.y));
      }
      plan.extremes[(tile_id * plan.splits + part) * 8 + tid] = all;
    }
    return;
  } else {
    if (uniform(row_begin < row_end)) {
      RowsEngine<Engine::kPaddedDim> rows(D);
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
    auto add = [](float4& sum, float4 x, float weight) {
      sum = make_float4(fmaf(x.x, weight, sum.x), fmaf(x.y, weight, sum.y), fmaf(x.z, weight, sum.z), fmaf(x.w, weight, sum.w));
    };
    auto store = [&](int column, int c, float4 sum, float total) {
      const float inverse = tokens >> position_of[column] & 1 ? 1.0f / total : 0.0f;
      const float4 x = inverse == 0.0f ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
      store_four(p.output, output_at[column] + c, p.dtype, x);
    };
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
        add(sum, *reinterpret_cast<const float4*>(shared + layout.warps + w * layout.warp_bytes + layout.sums + (column * result.stride + c) * 4), weight);
      }
      if (plan.splits == 1) {
        store(column, c, sum, total);
      } else {
        *reinterpret_cast<float4*>(partial + column * D + c) = sum;
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
    for (int i = tid; i < columns * (D / 4); i += blockDim.x) {
      const int column = i / (D / 4), c = i % (D / 4) * 4;
      float most = -1e30f, total = 0.0f;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int s = 0; s < plan.splits; ++s) most = fmaxf(most, __ldcg(parts + s * partial_floats(plan.columns, D) + plan.columns * D + column));
#pragma unroll 4
      for (int s = 0; s < plan.splits; ++s) {
        const float* x = parts + s * partial_floats(plan.columns, D);
        const float weight = exp2_fast(__ldcg(x + plan.columns * D + column) - most);
        total = fmaf(__ldcg(x + plan.columns * D + 8 + column), weight, total);
        add(sum, __ldcg(reinterpret_cast<const float4*>(x + column * D + c)), weight);
      }
      store(column, c, sum, total);
    }
  }
#endif
}

}  // namespace vkvx
