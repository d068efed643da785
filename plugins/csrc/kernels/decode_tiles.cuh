// The tiles of cached visual tokens that a warp of decode attends to, on their way through its
// buffers.
#pragma once

#include "decode_layout.cuh"

namespace vkvx {

// Into the level-2 cache.
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Walks the tiles of a slot's groups in order.
struct TileCursor {
  const int* starts;     // [groups + 1], first tile of each group in the list
  int tiles_of_group;    // in the cache
  int tile, group, end;  // the group's end in the list
  int place;             // of the tile in the cache
  int ordinal = 0;       // groups before this one

  __device__ __forceinline__ void start(const int* s, int first, int group_tiles) {
    starts = s;
    tiles_of_group = group_tiles;
    tile = first;
    group = 0;
    while (starts[group + 1] <= tile) ++group;
    end = starts[group + 1];
    place = group * tiles_of_group + tile - starts[group];
  }
  // Step to the next tile; true if it is of another group. Past the last tile only `tile` means
  // anything.
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

// Copies a warp's tiles, and the parameters of their groups, to its buffers, kLookahead tiles ahead
// of the one that is worked on.
template <class Engine, bool kScan, int kLookahead>
struct TileLoader {
  int lane, dim, key_planes, value_planes;
  int reciprocal;  // of dim / 8, times 65536
  // Of the slot's KV head.
  const int *keys, *values;
  const __half *key_params, *value_params;
  uint32_t key_buffer, value_buffer;
  const char*
      mine;  // the warp's shared memory, whose part `params` has those of kLookahead + 1 groups
  const DecodeLayout* layout;
  TileCursor ahead;  // the next tile to copy
  int tile_end;
  int stage = 0;
  bool new_group = true;

  // Chunk c of 16 bytes of a plane goes to place c ^ (c / (D / 8) & 7): rows that a load takes
  // together lie D / 8 chunks apart, and so in different banks.
  __device__ __forceinline__ void copy_planes(uint32_t to, const int* from, int planes) const {
    const char* at = reinterpret_cast<const char*>(from);
    if constexpr (Engine::kAny) {
#pragma unroll 1
      for (int i = lane; i < dim; i += 32) {
        const int place = (i ^ (i * reciprocal >> 16 & 7)) * 16;
        for (int plane = 0; plane < planes; ++plane)
          copy_async(to + plane * dim * 16 + place, at + (plane * dim + i) * 16);
      }
    } else {
      // Four rows of 8 chunks at a time, so that all addresses are two sums and constants.
      constexpr int kRow = 2 * Engine::kPaddedDim;  // bytes
      at += (lane >> 3) * kRow + (lane & 7) * 16;
      const uint32_t even = to + (lane >> 3) * kRow + ((lane & 7) ^ (lane >> 3)) * 16,
                     odd = even ^ 64;
#pragma unroll
      for (int plane = 0; plane < Engine::kPlanes; ++plane)
#pragma unroll
        for (int i = 0; i < Engine::kPaddedDim / 32; ++i) {
          const int offset = plane * Engine::kPaddedDim * 16 + (i & 1) * 4 * kRow + (i >> 1) * 128;
          copy_async((i & 1 ? odd : even) + offset, at + offset);
        }
    }
  }

  // Keys of the tile `ahead`, with the parameters if its group is new.
  __device__ __forceinline__ void load_keys() const {
    if (ahead.tile < tile_end) {
      copy_planes(key_buffer + stage * key_planes * dim * 16,
                  keys + static_cast<int64_t>(ahead.place) * key_planes * dim * 4, key_planes);
      if (new_group) {
        const uint32_t at =
            shared_address(mine + layout->params) + ahead.ordinal % (kLookahead + 1) * 10 * dim;
        const char* k =
            reinterpret_cast<const char*>(key_params + static_cast<int64_t>(ahead.group) * 3 * dim);
        const char* v = reinterpret_cast<const char*>(value_params +
                                                      static_cast<int64_t>(ahead.group) * 2 * dim);
        for (int i = lane; i < 6 * dim / 16; i += 32) copy_async(at + i * 16, k + i * 16);
        for (int i = lane; i < 4 * dim / 16; i += 32) copy_async(at + 6 * dim + i * 16, v + i * 16);
      }
    }
    copy_commit();
  }

  // Its values, then on to the next tile.
  __device__ __forceinline__ void load_values() {
    if (ahead.tile < tile_end) {
      if constexpr (!kScan)
        copy_planes(value_buffer + stage * value_planes * dim * 16,
                    values + static_cast<int64_t>(ahead.place) * value_planes * dim * 4,
                    value_planes);
      new_group = ahead.next();
    }
    copy_commit();
    stage = stage + 1 == kLookahead ? 0 : stage + 1;
  }

  __device__ __forceinline__ void load_first() {
#pragma unroll
    for (int i = 0; i < kLookahead; ++i) {
      load_keys();
      load_values();
    }
  }
};

}  // namespace vkvx
