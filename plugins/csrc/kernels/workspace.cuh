// Where things lie in the workspace, and what a call's sizes ask of it.
#pragma once

#include "decode.cuh"

namespace vkvx {

constexpr int kLeastUnits = 4;  // tiles or chunks of rows of a part: work for the warps of a block
constexpr int kMostOfCluster = 8;  // blocks that any GPU with clusters takes
constexpr int kUnitsOfCluster = 256;
constexpr int kCounters = 16384;  // at the start of the workspace, zero between calls

// Tiles and chunks of rows that a row and head has at most.
inline int64_t units_of(const VkvxParams& p) {
  const int seen = p.sliding_window ? p.sliding_window : INT32_MAX;  // tokens of a kind, at most
  return divide_up(min(p.visual_capacity, seen), kTile) +
         divide_up(min(p.text_capacity, seen), kRowsAtOnce) + 1;
}

// Parts of a decode: a block for each multiprocessor if there is work for it. More would pay for
// their start and their end.
inline int choose_splits(const VkvxParams& p, int64_t tiles, int processors) {
  const int64_t units = units_of(p), each = tiles > 0 ? tiles : 1;
  // Where a whole cluster of parts has a multiprocessor each, they are small. So are those of
  // windows, which have few units, without a second wave of blocks.
  const bool few =
      p.sliding_window || (units > 2 * kLeastUnits && processors >= kMostOfCluster * each);
  int64_t splits = p.splits > 0 ? p.splits : few ? processors / each : divide_up(processors, each);
  const int64_t most = divide_up(units, p.splits > 0 || few ? kLeastUnits : 2 * kLeastUnits);
  splits = splits < most ? splits : most;
  // A cluster combines its parts in less time than more parts save, until its warps have some units
  // each.
  if (p.splits == 0 && splits > kMostOfCluster && units <= kUnitsOfCluster) splits = kMostOfCluster;
  return tiles > kCounters || splits < 1 ? 1 : static_cast<int>(splits);
}

// Whether the parts have multiprocessors of their own. A quarter of the device stays free: not all
// places of a cluster can be filled.
inline bool have_room(const VkvxParams& p, int64_t tiles, int splits, int processors) {
  return p.splits == 0 && splits > 1 && 4 * tiles * splits <= 3 * processors;
}

// Whether the parts of a decode are a cluster, and combine without the workspace.
inline bool is_clustered(int splits, int capability) {
  return capability >= 90 && splits > 1 && splits <= kMostOfCluster;
}

struct Workspace {
  int* counters;
  int* rank;     // [B, S]
  int* run_end;  // [B, S], null without the mask `run`
  float* partial;
  float2* extremes;
  size_t bytes;

  // For decode with this many blocks per part, parts and columns of a block at most.
  Workspace(const VkvxParams& p, int64_t tiles, int splits, int columns) {
    char* at = static_cast<char*>(p.workspace);
    size_t used = 0;
    auto take = [&](size_t n) {
      char* here = at + used;
      used += (n + 255) & ~static_cast<size_t>(255);
      return here;
    };
    counters = reinterpret_cast<int*>(take(kCounters * sizeof(int)));
    const size_t each = static_cast<size_t>(p.rows) * p.positions * sizeof(int);
    rank = reinterpret_cast<int*>(take(each));
    run_end = p.visual_mask == VKVX_MASK_RUN ? reinterpret_cast<int*>(take(each)) : nullptr;
    extremes = reinterpret_cast<float2*>(
        take(p.correction == VKVX_CORRECTION_AFFINE ? tiles * splits * 8 * sizeof(float2) : 0));
    partial = reinterpret_cast<float*>(take(
        splits > 1 ? tiles * splits * partial_floats(columns, p.head_dim) * sizeof(float) : 0));
    bytes = used;
  }
};

// Bytes that suffice for attention with at most these sizes on devices of up to `processors`.
// choose_splits gives fewer parts to more tiles: tiles times parts is less than tiles + processors,
// and less than 2 * processors where there is more than one part.
inline size_t workspace_bound(const VkvxParams& p, int processors) {
  constexpr int least_columns = 4,
                most_columns =
                    8;  // query vectors of a block, but for `planes`, which takes few in all
  const int positions = p.positions < kMaxDecodePositions ? p.positions : kMaxDecodePositions;
  const int64_t column_tiles = divide_up(p.query_heads / p.kv_heads * positions, least_columns);
  const int64_t tiles = static_cast<int64_t>(p.rows) * p.kv_heads * column_tiles + processors,
                split = 2 * processors;
  VkvxParams none = p;
  none.correction = VKVX_CORRECTION_NONE;
  const size_t fixed = Workspace(none, 0, 1, 0).bytes;
  const size_t extremes = p.correction == VKVX_CORRECTION_AFFINE ? tiles * 8 * sizeof(float2) : 0;
  const size_t partial = split * partial_floats(most_columns, p.head_dim) * sizeof(float);
  return fixed + extremes + partial + 2 * 256;  // what rounding up adds
}

}  // namespace vkvx
