// Stores tokens as text rows, as they are or of 8 bits; at 16 bits of pictures everything.
#pragma once

#include "text_rows.cuh"

namespace vkvx {

// Text rows, or at 16 bits all tokens by rank. Grid: (entries, B, parts of a token): a decode step
// has few tokens, so they are shared out over blocks.
__global__ void append_rows_kernel(const __grid_constant__ VkvxParams p, const int* rank) {
  const int b = blockIdx.y, slot = p.slot[b];
  if (slot < 0) return;
  int position, row;
  if (rank == nullptr) {
    position = p.text_index[static_cast<int64_t>(b) * p.text_entries + blockIdx.x];
    row = blockIdx.x;
  } else {
    position = blockIdx.x;
    row = rank[static_cast<int64_t>(b) * p.positions + position];
  }
  row += p.text_count[slot];
  if (position < 0 ||
      (rank != nullptr && rank[static_cast<int64_t>(b) * p.positions + position] < 0) ||
      row >= p.text_capacity)
    return;
  const int D = p.head_dim;
  auto copy = [&](auto unit) {
    using Unit = decltype(unit);
    for (int i = blockIdx.z * blockDim.x + threadIdx.x; i < p.kv_heads * D;
         i += gridDim.z * blockDim.x) {
      const int head = i / D, c = i % D;
      const int64_t to =
          ((static_cast<int64_t>(slot) * p.kv_heads + head) * p.text_capacity + row) * D + c;
      static_cast<Unit*>(p.text_key)[to] = static_cast<const Unit*>(
          p.key)[b * p.key_stride[0] + head * p.key_stride[1] + position * p.key_stride[2] + c];
      static_cast<Unit*>(p.text_value)[to] =
          static_cast<const Unit*>(p.value)[b * p.value_stride[0] + head * p.value_stride[1] +
                                            position * p.value_stride[2] + c];
    }
  };
  if (p.dtype == VKVX_FLOAT32)
    copy(uint32_t{});
  else
    copy(uint16_t{});
}

constexpr int kCodeRowWarps = 8;

// Text rows of 8 bits, a warp for the key and one for the value of each KV head. Grid: (entries, B,
// parts of a token).
__global__ void __launch_bounds__(kCodeRowWarps * 32)
    append_code_rows_kernel(const __grid_constant__ VkvxParams p) {
  const int b = blockIdx.y, slot = p.slot[b];
  if (slot < 0) return;
  const int position = p.text_index[static_cast<int64_t>(b) * p.text_entries + blockIdx.x],
            row = blockIdx.x + p.text_count[slot],
            part = blockIdx.z * kCodeRowWarps + (threadIdx.x >> 5), head = part >> 1;
  if (position < 0 || row >= p.text_capacity || head >= p.kv_heads) return;
  append_code_row(p, part % 2 == 0, b, head, position,
                  (static_cast<int64_t>(slot) * p.kv_heads + head) * p.text_capacity + row);
}

}  // namespace vkvx
