// Where a warp of `shaped` keeps the errors of its 32 tokens in all channels, FP16, and their
// products with M. A lane gets and gives the 8 channels of a set of its token; sets are visited in
// order, and `turn` is called after each four.
#pragma once

#include "shape_metric.cuh"

namespace vkvx {

// Shared memory by way of which numbers of 32 tokens change hands.
struct ShapeExchange {
  float pulls[32][kSet];  // the two halves of a row change places in every other four rows
  uint4 rows[32];         // a token's errors in the channels of a set

  // From the layout of products, sums[i] of tokens 16 i and up, to that of tokens.
  __device__ __forceinline__ void store(const float (&sums)[2][4]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * i + 8 * half + lane / 4, column = 2 * (lane % 4);
        *reinterpret_cast<float2*>(&pulls[row][column ^ (row & 4)]) =
            make_float2(sums[i][2 * half], sums[i][2 * half + 1]);
      }
  }
  __device__ __forceinline__ void load(float (&pull)[kSet]) const {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int c = 0; c < kSet; c += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&pulls[lane][c ^ (lane & 4)]);
      pull[c] = four.x, pull[c + 1] = four.y, pull[c + 2] = four.z, pull[c + 3] = four.w;
    }
  }
};

__device__ __forceinline__ void unpack_errors(const uint4& errors, float (&e)[kSet]) {
  const uint32_t two[4] = {errors.x, errors.y, errors.z, errors.w};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(two[n]));
    e[2 * n] = pair.x, e[2 * n + 1] = pair.y;
  }
}

// In registers, as operands of products, for D = 32 kPairs. part[i][k] has 16 tokens and 16
// channels; the first two of a token's hold the four sets that are visited.
template <int kPairs>
struct RegisterErrors {
  static constexpr bool kAligned = true;  // what tokens it takes
  static constexpr bool kMatrixInSharedMemory = true;
  static constexpr int kBytes = 0;  // of shared memory, for a warp and a channel

  uint32_t part[2][2 * kPairs][4];

  __device__ __forceinline__ RegisterErrors(const VkvxParams&, uint4*) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int n = 0; n < 8 * kPairs; ++n) part[i][n / 4][n % 4] = 0;
  }

  // The products with the part of M of a set, as tensor cores leave them: of 16 tokens each.
  __device__ __forceinline__ void multiply(const uint4* matrix, float (&sums)[2][4]) const {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      // The channels that were visited last come last: those before need not wait for them.
      const int pair = (n + 1) % kPairs;
      const uint4 m = matrix[32 * pair + lane];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t (&a)[4] = part[i][2 * pair];
        mma_half(sums[i], a[0], a[1], a[2], a[3], m.x, m.y);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t (&a)[4] = part[i][2 * pair + 1];
        mma_half(sums[i], a[0], a[1], a[2], a[3], m.z, m.w);
      }
    }
  }
  // What the errors pull the channels of a set by. `matrix`: the part of M of the set.
  __device__ __forceinline__ void pull(int set, const uint4* matrix, ShapeExchange* exchange,
                                       float (&pull)[kSet]) const {
    float sums[2][4] = {};
    multiply(matrix, sums);
    exchange->store(sums);
    __syncwarp();
    exchange->load(pull);
  }
  // The lane's part of the sum of H_cc e_c (e_c + pull_c) over the channels of a set. `diagonal`:
  // H_cc of the set.
  __device__ __forceinline__ float weigh(int set, const uint4* matrix, const float* diagonal,
                                         ShapeExchange*) const {
    const float2 weight = *reinterpret_cast<const float2*>(diagonal + 2 * (threadIdx.x % 4));
    float sums[2][4] = {}, whole = 0.0f;
    multiply(matrix, sums);
#pragma unroll
    for (int n = 0; n < 4; ++n) {  // products and errors of a lane are those of the same channels
      const uint32_t two = part[n / 2][set / 2][2 * (set % 2) + n % 2];
      const float2 e = __half22float2(reinterpret_cast<const __half2&>(two));
      whole = fmaf(weight.x * e.x, e.x + sums[n / 2][2 * (n % 2)], whole);
      whole = fmaf(weight.y * e.y, e.y + sums[n / 2][2 * (n % 2) + 1], whole);
    }
    return whole;
  }
  __device__ __forceinline__ void replace(int set, const uint4& errors, ShapeExchange* exchange) {
    const int lane = threadIdx.x & 31;
    exchange->rows[lane] = errors;
    __syncwarp();
    uint32_t r[4];
    load_matrices(r, shared_address(exchange->rows + lane));
#pragma unroll
    for (int n = 0; n < 4; ++n) part[n / 2][set / 2][2 * (set % 2) + n % 2] = r[n];
  }
  __device__ __forceinline__ void turn() {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t a = part[i][0][r], b = part[i][1][r];
#pragma unroll
        for (int k = 0; k < 2 * kPairs - 2; ++k) part[i][k][r] = part[i][k + 2][r];
        part[i][2 * kPairs - 2][r] = a;
        part[i][2 * kPairs - 1][r] = b;
      }
  }
};

// In shared memory, [D / 8][32 tokens] of 16 bytes, for any D and any device.
template <bool kAlignedTokens>
struct SharedErrors {
  static constexpr bool kAligned = kAlignedTokens;
  static constexpr bool kMatrixInSharedMemory = false;
  static constexpr int kBytes = 32 * sizeof(__half);

  uint4* errors;
  int pairs, visited = 0;  // 32 channels each

  __device__ __forceinline__ SharedErrors(const VkvxParams& p, uint4* memory)
      : errors(memory), pairs(p.head_dim / 32) {
    for (int i = threadIdx.x & 31; i < 4 * pairs * 32; i += 32) errors[i] = make_uint4(0, 0, 0, 0);
    __syncwarp();
  }
  __device__ __forceinline__ void pull(int set, const uint4* matrix, ShapeExchange* exchange,
                                       float (&pull)[kSet]) const {
    const int lane = threadIdx.x & 31;
#if VKVX_HAS_TENSOR_CORES
    float sums[2][4] = {};
#pragma unroll 2
    for (int n = 0, pair = visited; n < pairs; ++n) {
      const uint4 m = matrix[32 * n + lane];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Matrices of 8 tokens and a set: both halves of 16 tokens, then of the next set.
        const uint32_t row =
            shared_address(errors + (4 * pair + lane / 16) * 32 + 16 * i + lane % 16);
        uint32_t a[4], b[4];
        load_matrices(a, row);
        load_matrices(b, row + 2 * 32 * sizeof(uint4));
        mma_half(sums[i], a[0], a[1], a[2], a[3], m.x, m.y);
        mma_half(sums[i], b[0], b[1], b[2], b[3], m.z, m.w);
      }
      pair = pair + 1 < pairs ? pair + 1 : 0;
    }
    exchange->store(sums);
    __syncwarp();
    exchange->load(pull);
#else
#pragma unroll
    for (int c = 0; c < kSet; ++c) pull[c] = 0.0f;
    for (int n = 0, pair = visited; n < pairs; ++n) {
      for (int s = 0; s < 4; ++s) {
        const uint4 e = errors[(4 * pair + s) * 32 + lane];
        const uint32_t two[4] = {e.x, e.y, e.z, e.w};
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
          for (int c = 0; c < kSet; ++c) {
            const float2 m =
                __half22float2(reinterpret_cast<const __half2*>(matrix + 32 * n + 4 * c + q)[s]);
            const float2 x = __half22float2(reinterpret_cast<const __half2&>(two[q]));
            pull[c] = fmaf(m.x, x.x, fmaf(m.y, x.y, pull[c]));
          }
      }
      pair = pair + 1 < pairs ? pair + 1 : 0;
    }
#endif
  }
  __device__ __forceinline__ float weigh(int set, const uint4* matrix, const float* diagonal,
                                         ShapeExchange* exchange) const {
    float pulls[kSet], e[kSet], whole = 0.0f;
    pull(set, matrix, exchange, pulls);
    unpack_errors(errors[(4 * visited + set) * 32 + (threadIdx.x & 31)], e);
#pragma unroll
    for (int c = 0; c < kSet; ++c) whole = fmaf(diagonal[c] * e[c], e[c] + pulls[c], whole);
    __syncwarp();
    return whole;
  }
  __device__ __forceinline__ void replace(int set, const uint4& fresh, ShapeExchange*) {
    errors[(4 * visited + set) * 32 + (threadIdx.x & 31)] = fresh;
    __syncwarp();
  }
  __device__ __forceinline__ void turn() { visited = visited + 1 < pairs ? visited + 1 : 0; }
};

}  // namespace vkvx
