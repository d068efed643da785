// Where a warp of `shaped` keeps the errors of its tokens in all channels, FP16, and their products
// with M. A lane gets and gives the 8 channels of a set of its kTokens tokens, 32 apart; sets are
// visited in order, and `turn` is called after each four.
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

// In registers, as operands of products, for D = 32 kPairs. part[i][k] has 16 tokens and 16
// channels; the first two of a token's hold the four sets that are visited.
template <int kPairs>
struct RegisterErrors {
  static constexpr bool kAligned = true;  // what tokens it takes
  static constexpr bool kMatrixInSharedMemory = true;
  // Two tokens share what a lane reads of the channels. Shared memory is what bounds the kernel.
  static constexpr int kTokens = 2;
  static constexpr int kBytes = 0;  // of shared memory, for a warp and a channel

  uint32_t part[2 * kTokens][2 * kPairs][4];

  __device__ __forceinline__ RegisterErrors(const VkvxParams&, uint4*) {
#pragma unroll
    for (int i = 0; i < 2 * kTokens; ++i)
#pragma unroll
      for (int n = 0; n < 8 * kPairs; ++n) part[i][n / 4][n % 4] = 0;
  }

  // What the errors pull the channels of a set by, and the lane's errors in them. `matrix`: the
  // part of M of the set.
  __device__ __forceinline__ void pull(int set, const uint4* matrix, ShapeExchange* exchange,
                                       float (&pull)[kTokens][kSet], uint4 (&mine)[kTokens]) const {
    const int lane = threadIdx.x & 31;
    float sums[kTokens][2][4] = {};
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const uint4 m = matrix[32 * pair + lane];
#pragma unroll
      for (int i = 0; i < 2 * kTokens; ++i) {
        const uint32_t (&a)[4] = part[i][2 * pair];
        mma_half(sums[i / 2][i % 2], a[0], a[1], a[2], a[3], m.x, m.y);
      }
#pragma unroll
      for (int i = 0; i < 2 * kTokens; ++i) {
        const uint32_t (&a)[4] = part[i][2 * pair + 1];
        mma_half(sums[i / 2][i % 2], a[0], a[1], a[2], a[3], m.z, m.w);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      exchange[t].store(sums[t]);
#pragma unroll
      for (int n = 0; n < 4; ++n)
        store_word(shared_address(exchange[t].rows + 8 * n + lane / 4) + 4 * (lane % 4),
                   part[2 * t + n / 2][set / 2][2 * (set % 2) + n % 2]);
    }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      exchange[t].load(pull[t]);
      mine[t] = exchange[t].rows[lane];
    }
  }
  __device__ __forceinline__ void replace(int set, const uint4 (&errors)[kTokens],
                                          ShapeExchange* exchange) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) exchange[t].rows[lane] = errors[t];
    __syncwarp();
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      uint32_t r[4];
      load_matrices(r, shared_address(exchange[t].rows + lane));
#pragma unroll
      for (int n = 0; n < 4; ++n) part[2 * t + n / 2][set / 2][2 * (set % 2) + n % 2] = r[n];
    }
  }
  __device__ __forceinline__ void turn() {
#pragma unroll
    for (int i = 0; i < 2 * kTokens; ++i)
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
  static constexpr int kTokens = 1;
  static constexpr int kBytes = 32 * sizeof(__half);

  uint4* errors;
  int pairs, visited = 0;  // 32 channels each

  __device__ __forceinline__ SharedErrors(const VkvxParams& p, uint4* memory)
      : errors(memory), pairs(p.head_dim / 32) {
    for (int i = threadIdx.x & 31; i < 4 * pairs * 32; i += 32) errors[i] = make_uint4(0, 0, 0, 0);
    __syncwarp();
  }
  __device__ __forceinline__ void pull(int set, const uint4* matrix, ShapeExchange* exchange,
                                       float (&pull)[1][kSet], uint4 (&mine)[1]) const {
    const int lane = threadIdx.x & 31;
    mine[0] = errors[(4 * visited + set) * 32 + lane];
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
    exchange->load(pull[0]);
#else
#pragma unroll
    for (int c = 0; c < kSet; ++c) pull[0][c] = 0.0f;
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
            pull[0][c] = fmaf(m.x, x.x, fmaf(m.y, x.y, pull[0][c]));
          }
      }
      pair = pair + 1 < pairs ? pair + 1 : 0;
    }
#endif
  }
  __device__ __forceinline__ void replace(int set, const uint4 (&fresh)[1], ShapeExchange*) {
    errors[(4 * visited + set) * 32 + (threadIdx.x & 31)] = fresh[0];
    __syncwarp();
  }
  __device__ __forceinline__ void turn() { visited = visited + 1 < pairs ? visited + 1 : 0; }
};

}  // namespace vkvx
