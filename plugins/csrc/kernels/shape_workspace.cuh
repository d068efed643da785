// Where quantiser `shaped` keeps what it needs beside the tokens, and the distance of its levels.
#pragma once

#include "append.cuh"

namespace vkvx {

size_t plain_workspace(const VkvxParams& p);

constexpr int kSet = 8;  // channels whose codes are chosen between two products with M

struct ShapeWorkspace {
  // Of keys for each row and head, then of values for each head:
  __half* matrix;   // M [D][D], in the order of fragments: see place_in_matrix
  float* inner;     // M(k, c) of the channels k after c in its set: [D][kSet], else 0
  float* diagonal;  // H(c, c): [D]
  float* squares;   // sums of H(c, k)^2 over all k and the channels c of a set: [D / kSet]
  // For each row, head and 32 entries of the call, first of keys, then of values:
  float* partial;  // sums of e_c by channel; of keys also of e_c^2 by channel and of e . H e
  size_t bytes;

  ShapeWorkspace(const VkvxParams& p, void* start) {
    char* at = static_cast<char*>(start);
    size_t used = 0;
    auto take = [&](size_t n) {
      char* here = at + used;
      used += (n + 255) & ~static_cast<size_t>(255);
      return here;
    };
    const size_t D = p.head_dim, heads = p.kv_heads, rows = p.rows, matrices = (rows + 1) * heads;
    matrix = reinterpret_cast<__half*>(take(matrices * D * D * sizeof(__half)));
    inner = reinterpret_cast<float*>(take(matrices * D * kSet * sizeof(float)));
    diagonal = reinterpret_cast<float*>(take(matrices * D * sizeof(float)));
    squares = reinterpret_cast<float*>(take(matrices * (D / kSet) * sizeof(float)));
    partial = reinterpret_cast<float*>(
        take(rows * heads * (p.visual_entries / 32) * (3 * D + 1) * sizeof(float)));
    bytes = used;
  }
};

// That of a call.
inline ShapeWorkspace shape_workspace(const VkvxParams& p) {
  return {p, static_cast<char*>(p.workspace) + plain_workspace(p)};
}

// Partial sums of a row and head, and how many numbers each has.
__device__ __forceinline__ int partial_size(const VkvxParams& p, bool is_key) {
  return is_key ? 2 * p.head_dim + 1 : p.head_dim;
}
__device__ __forceinline__ float* partial_sums(const VkvxParams& p, float* partial, bool is_key,
                                               int b, int head) {
  const int64_t heads = static_cast<int64_t>(p.rows) * p.kv_heads, parts = p.visual_entries / 32,
                number = static_cast<int64_t>(b) * p.kv_heads + head;
  const int64_t before = is_key ? 0 : heads * parts * partial_size(p, true);
  return partial + before + number * parts * partial_size(p, is_key);
}

// Number of the metric of keys of row b, or of values.
__device__ __forceinline__ int64_t metric_number(const VkvxParams& p, bool is_key, int b,
                                                 int head) {
  return static_cast<int64_t>(is_key ? b : p.rows) * p.kv_heads + head;
}

// Distance of two levels in standard deviations; all lanes of a warp ask.
__device__ __forceinline__ float level_distance(const VkvxParams& p, const ShapeWorkspace& w,
                                                bool is_key, int b, int head) {
  constexpr float one = kShapedStep[1], two = kShapedStep[2], four = kShapedStep[4],
                  eight = kShapedStep[8];
  const int bits = is_key ? p.key_bits : p.value_bits, D = p.head_dim, lane = threadIdx.x & 31;
  if (bits > 1) return bits == 2 ? two : bits == 4 ? four : eight;
  const int64_t number = metric_number(p, is_key, b, head);
  float trace = 0.0f, square = 0.0f;
  for (int c = lane; c < D; c += 32) trace += w.diagonal[number * D + c];
  for (int i = lane; i < D / kSet; i += 32) square += w.squares[number * (D / kSet) + i];
  trace = warp_sum(trace);
  square = warp_sum(square);
  const float flatness = trace * trace / (static_cast<float>(D) * square);
  return fminf(fmaf(kShapedStepSlope, 1.0f - flatness, kShapedFlatStep), one);
}

}  // namespace vkvx
