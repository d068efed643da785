// Decode attention: calls of at most 8 positions over packed groups, 16-bit text rows and the
// call's own tokens, in one launch.
//
// A block of up to `Engine::kWarps` warps takes one KV head of one row, at most `Engine::kColumns`
// query vectors of it, and one of `splits` parts of what is cached. Everything cached is laid out
// as a list of units: tiles of 128 visual tokens, text rows by 16, and the own tokens. Units have
// costs, in multiples of 16 D bytes, and each warp of each part takes the units that start in its
// share of the total: shares follow the counts on the device, the grid only the shapes. Warps work
// alone, each with its own buffers, and fold their results into shared memory at group ends. The
// parts of a row and head combine as a cluster of blocks, or in the last block to arrive.
#pragma once

#include "decode_block.cuh"

namespace vkvx {

// Grid: (parts * column tiles, Hkv, B). With kScan it finds the extremes of the scores alone, which
// `affine` needs first.
template <class Engine, bool kScan, int kLookahead>
__global__ void __launch_bounds__(Engine::kMostWarps * 32)
    decode_kernel(const __grid_constant__ VkvxParams p, const __grid_constant__ DecodePlan plan) {
#if VKVX_HAS_TENSOR_CORES
  extern __shared__ __align__(128) char shared[];
  __shared__ unsigned tokens;
  __shared__ bool last;
  __shared__ int position_of[Engine::kColumns];
  __shared__ unsigned own_seen[Engine::kColumns];
  __shared__ int64_t output_at[Engine::kColumns];
  DecodeBlock<Engine, kScan, kLookahead> block(p, plan, tokens, position_of, own_seen, output_at,
                                               shared);
  const int lane = block.lane, groups = block.groups, D = block.D;
  int* starts = block.starts;
  int* group_counts = starts + groups + 2;
  if (plan.is_clustered) start_in_cluster();  // combine_warps waits
  wait_for_earlier_kernels();
  let_next_kernel_start();
  block.prefetch_counts();
  block.slot = p.slot[block.b];
  block.stage_queries();
  block.locate_columns();
  if (block.slot < 0) {  // in all parts
    block.store_zeros();
    return;
  }
  const int* counts = p.visual_count + static_cast<int64_t>(block.slot) * groups;
  const int text_count = p.text_count[block.slot];
  if (block.warp == 0) {  // first tile of each group
    int before = 0;
#pragma unroll 1
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
  const float factor = p.scale * kLog2e;  // from products to scores
  const int64_t tile_id =
      (static_cast<int64_t>(block.b) * p.kv_heads + block.head) * plan.column_tiles +
      block.column_tile;
  const bool is_affine = p.correction == VKVX_CORRECTION_AFFINE && starts[groups] > 0;
  if (!kScan && is_affine && block.tid < Engine::kColumns) block.find_affine(tile_id);
  char* mine = block.memory_of(block.warp);
  const WarpShare share = block.share_units(text_count);
  WarpResult result;
  block.start_result(result, mine);
  Engine engine(p);
  block.set_first_seen(engine);

  // The warp's tiles.
  const bool has_tiles = uniform(share.tile_begin < share.tile_end);
  TileLoader<Engine, kScan, kLookahead> loader;
  TileCursor cursor;
  block.start_tiles(loader, cursor, mine, share, has_tiles);
  loader.load_first();
  copy_wait<2 * kLookahead>();
  block.convert_queries(factor);
  __syncthreads();
  // Of a group, by its place in the share: scales, offsets and errors of the keys, then scales and
  // offsets of the values.
  auto params_of = [&](int ordinal) {
    return reinterpret_cast<const __half*>(mine + block.layout.params +
                                           ordinal % (kLookahead + 1) * 10 * D);
  };
  int stage = 0;
  bool starts_group = true;
  int left = has_tiles ? group_counts[cursor.group] - (cursor.tile - starts[cursor.group]) * kTile
                       : 0;  // tokens of the group from this tile on
  while (has_tiles && uniform(cursor.tile < share.tile_end)) {
    copy_wait<2 * kLookahead - 1>();
    __syncwarp();
    if (uniform(starts_group)) {
      engine.start_group(params_of(cursor.ordinal), block.queries, D + D / 8, p.correction,
                         p.correction_limit, !kScan && is_affine ? block.affine : nullptr);
      engine.start_segment();
    }
    const int valid = min(kTile, left);
    engine.scores(loader.key_buffer + stage * block.key_planes * D * 16);
    __syncwarp();
    loader.load_keys();
    if constexpr (kScan) {
      engine.extremes(valid);
    } else {
      engine.softmax(valid, cursor.place * kTile,
                     [&]() { engine.end_segment(result, params_of(cursor.ordinal) + 3 * D); });
    }
    copy_wait<2 * kLookahead - 1>();
    __syncwarp();
    if constexpr (!kScan) engine.values(loader.value_buffer + stage * block.value_planes * D * 16);
    __syncwarp();
    loader.load_values();
    stage = stage + 1 == kLookahead ? 0 : stage + 1;
    const int ordinal = cursor.ordinal;
    starts_group = cursor.next();
    left -= kTile;
    if (uniform(starts_group || cursor.tile == share.tile_end)) {
      if constexpr (!kScan) engine.end_segment(result, params_of(ordinal) + 3 * D);
      if (starts_group && cursor.tile < share.tile_end) left = group_counts[cursor.group];
    }
  }
  copy_wait<0>();
  __syncwarp();

  if constexpr (kScan) {
    block.store_extremes(tile_id, mine, engine);
  } else {
    if (uniform(share.row_begin < share.row_end)) {
      RowsEngine<Engine::kPaddedDim> rows(D);
      rows.start(block.raw_queries, Engine::kColumns);
      block.attend_rows(rows, mine, share, text_count, factor);
      rows.finish(result);
    }
    block.combine_warps(tile_id, result);
    block.combine_blocks(tile_id, last);
  }
#endif
}

}  // namespace vkvx
