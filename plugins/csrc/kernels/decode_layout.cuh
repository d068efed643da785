// Where a decode keeps its data: in the workspace, and in the shared memory of a block.
#pragma once

#include "decode_rows.cuh"

namespace vkvx {

__host__ __device__ __forceinline__ int partial_floats(int columns, int dim) {
  return columns * dim + 16;
}

// Shared memory of a block, in bytes from its start.
struct DecodeLayout {
  int queries, raw_queries, starts, affine, incoming, warps, warp_bytes, total;
  int keys, values, params, sums, scalars;  // from the start of a warp's part

  DecodeLayout() = default;
  __host__ __device__ DecodeLayout(int key_planes, int value_planes, int dim, int padded_dim,
                                   int query_columns, int columns, int lookahead, int groups,
                                   int cluster, int warp_count) {
    auto align = [](int x) { return (x + 127) & ~127; };
    queries = 0;
    raw_queries = align(queries + query_columns * (dim + dim / 8) * 4);
    starts = align(raw_queries + query_columns * (dim + 8) * 2);
    affine = align(starts + (2 * groups + 2) * 4);
    incoming = align(affine + 8 * 8);
    warps = align(incoming + cluster * partial_floats(columns, dim) * 4);
    keys = 0;
    values = keys + lookahead * key_planes * dim * 16;
    params = align(values + lookahead * value_planes * dim * 16);
    // The same buffers hold text rows later.
    const int tiles_end = params + (lookahead + 1) * 10 * dim,
              rows_end = 2 * kRowsAtOnce * padded_dim * 2;
    sums = align(tiles_end > rows_end ? tiles_end : rows_end);
    scalars = align(sums + sums_stride(padded_dim) * columns * 4);
    warp_bytes = align(scalars + 16 * 4);
    total = warps + warp_count * warp_bytes;
  }

  static __host__ __device__ int sums_stride(int padded_dim) { return padded_dim + 4; }
};

// How a decode is divided over blocks and what it is divided by: computed once, by the host.
struct DecodePlan {
  int splits;         // parts of the sequence
  bool is_clustered;  // the parts are a cluster, and combine in its shared memory
  int column_tiles;   // ceil(query heads of a KV head * S / columns)
  int columns;        // columns stored per warp
  int warps;          // of a block
  unsigned share;     // 2^32 over the warps of all parts
  bool prefetches;    // the counts of all slots
  bool appends;       // the call's text tokens are stored, too
  int ratio;          // query heads of a KV head
  int groups, group_tiles;
  DecodeLayout layout;
  int* arrived;    // [B * Hkv * column_tiles] counters, zero between calls
  float* partial;  // per (row, head, column tile, part): [columns][D] sums, then most[8], total[8]
  float2* extremes;  // affine: per (row, head, column tile, part, column): least and greatest score
};

}  // namespace vkvx
