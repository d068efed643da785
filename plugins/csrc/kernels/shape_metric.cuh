// What quantiser `shaped` makes of the metrics once per call, before tokens are looked at.
//
// A channel's wish is its number plus what the errors of the others pull it by: the sum over k of
// M(c, k) e_k, with M(c, k) = H(c, k) / H(c, c) and M(c, c) = 0. The metric of keys is turned to
// the row's last position, so each row and head has an M of its own; that of values is shared.
#pragma once

#include "shape_workspace.cuh"

namespace vkvx {

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

// Elements of a column of a head's metric, or of that of keys turned to the row's last position,
// R H R^T.
struct MetricColumn {
  const __half* metric;
  int D, column, other;
  float cosine, sine;
  const float* rotation;  // of keys

  __device__ __forceinline__ MetricColumn(const VkvxParams& p, bool is_key, int head, int b, int k)
      : metric(static_cast<const __half*>(is_key ? p.key_metric : p.value_metric) +
               static_cast<int64_t>(head) * p.head_dim * p.head_dim),
        D(p.head_dim),
        column(k),
        other(k),
        cosine(1.0f),
        sine(0.0f),
        rotation(nullptr) {
    if (!is_key) return;
    rotation = p.rotation + static_cast<int64_t>(b) * 2 * D;
    const RotaryPair pair = rotary_pair(p, k);
    other = pair.other, cosine = rotation[k], sine = pair.sign * rotation[D + k];
  }
  __device__ __forceinline__ float operator()(const VkvxParams& p, int row) const {
    if (!rotation) return __half2float(metric[row * D + column]);
    const RotaryPair pair = rotary_pair(p, row);
    auto turned = [&](int at) {
      return __half2float(metric[row * D + at]) * rotation[row] +
             __half2float(metric[pair.other * D + at]) * (pair.sign * rotation[D + row]);
    };
    return turned(column) * cosine + turned(other) * sine;
  }
};

// Fills matrix, inner, diagonal and squares. Grid: (2 * D / kSet, Hkv, B): x runs over sets of
// channels of keys, then of values. A thread has a column.
__global__ void __launch_bounds__(VKVX_MAX_HEAD_DIM)
    shape_metric_kernel(const __grid_constant__ VkvxParams p, ShapeWorkspace w) {
  __shared__ float diagonals[kSet], squares[VKVX_MAX_HEAD_DIM / 32];
  const int D = p.head_dim, sets = D / kSet, head = blockIdx.y, b = blockIdx.z, k = threadIdx.x;
  const bool is_key = blockIdx.x < sets;
  const int set = is_key ? blockIdx.x : blockIdx.x - sets, first = kSet * set;
  let_next_kernel_start();
  if (is_key ? p.slot[b] < 0 : b > 0) return;
  const int64_t number = metric_number(p, is_key, b, head);
  const MetricColumn column(p, is_key, head, b, k);
  float h[kSet], square = 0.0f;
#pragma unroll
  for (int c = 0; c < kSet; ++c) {
    h[c] = column(p, first + c);
    square = fmaf(h[c], h[c], square);
    if (k == first + c) w.diagonal[number * D + k] = diagonals[c] = h[c];
  }
  square = warp_sum(square);
  if (k % 32 == 0) squares[k / 32] = square;
  __syncthreads();
  __half* matrix = w.matrix + number * D * D + place_in_matrix(first, k, D);
#pragma unroll
  for (int c = 0; c < kSet; ++c) {
    const float pull = k != first + c && diagonals[c] > 0.0f ? h[c] / diagonals[c] : 0.0f;
    const __half rounded = __float2half_rn(fminf(fmaxf(pull, -kHalfMax), kHalfMax));
    matrix[c * (place_in_matrix(1, 0, 32) - place_in_matrix(0, 0, 32))] = rounded;
    if (k / kSet == set)
      w.inner[(number * D + k) * kSet + c] = first + c > k ? __half2float(rounded) : 0.0f;
  }
  if (k > 0) return;
  float all = 0.0f;
  for (int i = 0; i < D / 32; ++i) all += squares[i];
  w.squares[number * sets + set] = all;
}

}  // namespace vkvx
