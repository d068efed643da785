// What quantiser `shaped` makes of the metrics once per call, before tokens are looked at, and
// where that lies in the workspace.
//
// A channel's wish is its number plus what the errors of the others pull it by: the sum over k of
// M(c, k) e_k, with M(c, k) = H(c, k) / H(c, c) and M(c, c) = 0. The metric of keys is turned to
// the row's last position, so each row and head has an M of its own; that of values is shared.
#pragma once

#include "append.cuh"

namespace vkvx {

constexpr int kSet = 8;  // channels whose codes are chosen between two products with M

struct ShapeWorkspace {
  // Of keys for each row and head, then of values for each head:
  __half* matrix;   // M [D][D], in the order of fragments: see place_in_matrix
  float* inner;     // M(k, c) of the channels k after c in its set: [D][kSet], else 0
  float* diagonal;  // H(c, c): [D]
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
    partial = reinterpret_cast<float*>(
        take(rows * heads * (p.visual_entries / 32) * (3 * D + 1) * sizeof(float)));
    bytes = used;
  }
};

// Partial sums of a row and head, `parts` of them, and how many numbers each has.
__device__ __forceinline__ int partial_size(const VkvxParams& p, bool is_key) {
  return is_key ? 2 * p.head_dim + 1 : p.head_dim;
}
__device__ __forceinline__ float* partial_sums(const VkvxParams& p, float* partial, bool is_key,
                                               int b, int head, int parts) {
  const int64_t heads = static_cast<int64_t>(p.rows) * p.kv_heads,
                number = static_cast<int64_t>(b) * p.kv_heads + head;
  const int64_t before = is_key ? 0 : heads * parts * partial_size(p, true);
  return partial + before + number * parts * partial_size(p, is_key);
}

// Number of the metric of keys of row b, or of values.
__device__ __forceinline__ int64_t metric_number(const VkvxParams& p, bool is_key, int b,
                                                 int head) {
  return static_cast<int64_t>(is_key ? b : p.rows) * p.kv_heads + head;
}

// Where M(c, k) lies: a lane's 16 bytes are its part of two products of 16 channels k with the 8
// channels of a set, as mma_half wants them. The channels k of set c / 8 begin with its own 32.
__device__ __forceinline__ int place_in_matrix(int c, int k, int D) {
  const int pairs = D / 32, pair = (k / 32 - c / 32 + pairs) % pairs, lane = c % 8 * 4 + k % 8 / 2;
  return ((c / 8 * pairs + pair) * 32 + lane) * 8 + k % 32 / 8 * 2 + k % 2;
}

// The channel that RoPE turns together with one, and the sign of its part. Channels that are not
// turned are alone: their sine is 0.
struct RotaryPair {
  int other;
  float sign;
};

__device__ __forceinline__ RotaryPair rotary_pair(const VkvxParams& p, int channel) {
  const int turned = p.rotary_dim ? p.rotary_dim : p.head_dim, half = turned / 2;
  if (channel >= turned) return {channel, 0.0f};
  if (p.rotary_interleaved) return {channel ^ 1, channel % 2 ? 1.0f : -1.0f};
  return channel < half ? RotaryPair{channel + half, -1.0f} : RotaryPair{channel - half, 1.0f};
}

// Element (i, j) of a head's metric; that of keys is turned to the row's last position, R H R^T.
__device__ __forceinline__ float metric_at(const VkvxParams& p, bool is_key, int head, int b, int i,
                                           int j) {
  const int D = p.head_dim;
  const __half* metric = static_cast<const __half*>(is_key ? p.key_metric : p.value_metric) +
                         static_cast<int64_t>(head) * D * D;
  if (!is_key) return __half2float(metric[i * D + j]);
  const float* cosine = p.rotation + static_cast<int64_t>(b) * 2 * D;
  const float* sine = cosine + D;
  const RotaryPair pair_i = rotary_pair(p, i), pair_j = rotary_pair(p, j);
  const int other_i = pair_i.other, other_j = pair_j.other;
  const float sine_i = pair_i.sign * sine[i], sine_j = pair_j.sign * sine[j];
  auto row = [&](int column) {
    return __half2float(metric[i * D + column]) * cosine[i] +
           __half2float(metric[other_i * D + column]) * sine_i;
  };
  return row(j) * cosine[j] + row(other_j) * sine_j;
}

// Fills matrix, inner and diagonal. Grid: (2 * D / kSet, Hkv, B): x runs over sets of channels of
// keys, then of values.
__global__ void __launch_bounds__(256)
    shape_metric_kernel(const __grid_constant__ VkvxParams p, ShapeWorkspace w) {
  __shared__ float diagonals[kSet];
  const int D = p.head_dim, sets = D / kSet, head = blockIdx.y, b = blockIdx.z;
  const bool is_key = blockIdx.x < sets;
  const int first = kSet * (is_key ? blockIdx.x : blockIdx.x - sets);
  if (is_key ? p.slot[b] < 0 : b > 0) return;
  const int64_t number = metric_number(p, is_key, b, head);
  if (threadIdx.x < kSet) {
    const int c = first + threadIdx.x;
    w.diagonal[number * D + c] = diagonals[threadIdx.x] = metric_at(p, is_key, head, b, c, c);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSet * D; i += blockDim.x) {
    const int c = i / D, k = i % D;
    float pull = 0.0f;
    if (k != first + c && diagonals[c] > 0.0f)
      pull = metric_at(p, is_key, head, b, first + c, k) / diagonals[c];
    const __half rounded = __float2half_rn(fminf(fmaxf(pull, -kHalfMax), kHalfMax));
    w.matrix[number * D * D + place_in_matrix(first + c, k, D)] = rounded;
    if (k / kSet == first / kSet)
      w.inner[(number * D + k) * kSet + c] = first + c > k ? __half2float(rounded) : 0.0f;
  }
}

}  // namespace vkvx
