// Decode attention of few rows: one position, head dim 128, packed pictures, on clusters of blocks.
//
// Where all blocks have a multiprocessor of their own, what takes time is not bytes but loads that
// wait for one another and instructions, which come from memory once a step. So a part of the
// sequence is taken by a whole block in a few short steps, each a loop of small code that all warps
// share: codes and rows into shared memory, queries to integers of 16 bits for each group, scores,
// weights relative to the block's largest score, sums. The parts are a cluster and combine in its
// shared memory.
//
// Codes are multiplied a plane at a time by the INT8 tensor cores: four bits of a word become bytes
// by a logic instruction, for values after a shift, and sums are doubled from plane to plane. Of
// the 8 columns of a product, 2q and 2q + 1 are the low and the high byte of query vector q, or of
// its weights. Lane 4g + t so has rows g and g + 8 of vector t, of tokens in scores and of channels
// in sums, and with columns 2q and 2q + 1 of rows of text the same: there they are the vector twice
// in scores, and in sums its weights and what rounding took from them.
//
// Scores and weights of 128 tokens lie so that token 32 a + 8 m + j has place 4 (8 a + j) + m: the
// bytes that make up one register of the second product are neighbours.
#pragma once

#include "few_part.cuh"

namespace vkvx {

__device__ __forceinline__ unsigned reduce_sum(unsigned x) {
#if VKVX_HAS_TENSOR_CORES
  return __reduce_add_sync(kFull, x);
#else
  return x;
#endif
}

// A block: its queries, scores, weights and sums.
template <bool kBfloat>
struct FewBlock : FewPart {
  static constexpr int kRecord = 4 * 16 + 8;  // floats: sums, then most and total of each vector
  static constexpr float kUnit = 1.0f / 65535.0f;
  static constexpr float kMagic = 12582912.0f;  // integers in the low bits of floats
  static constexpr int kMagicBits = 0x4b400000;

  float* records;     // of the parts, for the channels that this block combines
  uint64_t* arrived;  // passed when they have come
  float sum[2], total, most;

  __device__ __forceinline__ FewBlock(const FewPart& from, float* incoming, uint64_t* barrier)
      : FewPart(from), records(incoming), arrived(barrier) {
    sum[0] = sum[1] = total = 0.0f;
    most = -1e30f;
  }

  static __device__ __forceinline__ void to_floats(uint2 from, float (&to)[4]) {
    const float2 x = __half22float2(reinterpret_cast<const __half2&>(from.x)),
                 y = __half22float2(reinterpret_cast<const __half2&>(from.y));
    to[0] = x.x, to[1] = x.y, to[2] = y.x, to[3] = y.y;
  }

  // Queries times the scales of keys as integers of 16 bits, one vector and group a warp. Their
  // bytes lie as lanes of the products read them: those of columns 2q, then 2q + 1.
  __device__ __forceinline__ void fold_queries() {
    const int vector = warp & 3;
    const float middle = 0.5f * ((1 << p.key_bits) - 1);
#pragma unroll 1
    for (int i = warp >> 2; i < groups; i += kFewWarps / 4) {
      float scale[4], offset[4], error[4];
      to_floats(params[0], scale);
      to_floats(params[1], offset);
      to_floats(params[2], error);
      load_key_params(i + kFewWarps / 4);
      float u[4], most_here = 0.0f, side = 0.0f, all = 0.0f, spread = 0.0f;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        u[k] = query[k] * scale[k];
        most_here = fmaxf(most_here, fabsf(u[k]));
        all += u[k];
        side = fmaf(query[k], offset[k], side);
        const float y = query[k] * error[k];
        spread = fmaf(y, y, spread);
      }
      most_here = fmaxf(__int_as_float(reduce_max(__float_as_int(most_here))), 1e-30f);
      const float inverse = most_here * (1.0f / 32600.0f), factor = __fdividef(32600.0f, most_here);
      char* to = at<char>(plan.layout.query_bytes) +
                 ((2 * i + (lane & 1)) * 32 + 8 * vector + (lane >> 3)) * 16 + (lane >> 1 & 3);
      uint32_t rounded = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // Divided by what `bytes_of` multiplies by, which saves it a shift.
        const uint32_t x = __float_as_uint(fmaf(u[k], factor * (1.0f / (1 << k)), kMagic));
        rounded += (x - kMagicBits) << k;
        to[4 * k] = static_cast<char>(x);
        to[64 + 4 * k] = static_cast<char>((x + 128) >> 8);  // right for a signed lower byte
      }
      // What rounding took from the query is made up for at the middle code.
      side = fmaf(fmaf(-static_cast<float>(static_cast<int>(rounded)), inverse, all), middle, side);
      side = warp_sum(side);
      if (p.correction == VKVX_CORRECTION_EXPECTED)
        side += kLog2e * expected_correction(0.5f / (kLog2e * kLog2e) * warp_sum(spread),
                                             p.correction_limit);
      if (lane == 0) {
        at<float2>(plan.layout.steps)[4 * i + vector] = make_float2(inverse, side);
        at<int>(plan.layout.totals)[4 * i + vector] = 0;
      }
    }
  }

  // Four codes of a word as bytes: bits j, j + 8, j + 16 and j + 24, times 2^(j % 4) for queries.
  template <bool kOfKeys>
  static __device__ __forceinline__ uint32_t bytes_of(uint32_t word, int j) {
    return kOfKeys ? word >> (j & 4) & 0x01010101u << (j & 3) : word >> j & 0x01010101u;
  }

  // D = D + codes of words x and y, in rows g and g + 8, times the bytes of 8 columns.
  template <bool kOfKeys>
  static __device__ __forceinline__ void multiply(int (&d)[4], uint32_t x, uint32_t y,
                                                  const uint4 (&bytes)[2]) {
    const uint32_t low[4] = {bytes[0].x, bytes[0].y, bytes[0].z, bytes[0].w},
                   high[4] = {bytes[1].x, bytes[1].y, bytes[1].z, bytes[1].w};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      mma_bytes<false, kOfKeys>(d, bytes_of<kOfKeys>(x, j), bytes_of<kOfKeys>(y, j),
                                bytes_of<kOfKeys>(x, j + 4), bytes_of<kOfKeys>(y, j + 4), low[j],
                                high[j]);
  }

  // Scores of 16 tokens of pictures: of tokens g and g + 8, vector t. Returns how many are left in
  // their group.
  __device__ __forceinline__ int score_codes(int i, float (&score)[2]) const {
    const int here = tile + (i >> 3), group = group_of(here) - first_group;
    uint4 bytes[2];
    bytes[0] = at<uint4>(plan.layout.query_bytes)[group * 64 + lane];
    bytes[1] = at<uint4>(plan.layout.query_bytes)[group * 64 + 32 + lane];
    const float2 step = at<float2>(plan.layout.steps)[4 * group + t];
    const uint32_t* words = at<uint32_t>(plan.layout.keys) + (i >> 3) * p.key_bits * 4 * kFewDim +
                            (16 * (i & 7) + g) * 4 + t;
    int d[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int plane = p.key_bits - 1; plane >= 0; --plane) {
#pragma unroll
      for (int k = 0; k < 4; ++k) d[k] *= 2;
      multiply<true>(d, words[plane * 4 * kFewDim], words[plane * 4 * kFewDim + 32], bytes);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      score[r] = fmaf(static_cast<float>(d[2 * r] + 256 * d[2 * r + 1]), step.x, step.y);
    return counts[first_group + group] -
           ((here - (first_group + group) * plan.group_tiles) * kTile) - 16 * (i & 7);
  }

  // The same of rows.
  __device__ __forceinline__ int score_rows(int i, float (&score)[2]) const {
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const uint16_t* q = &raw[g >> 1][2 * t];
    const uint32_t keys = key_rows() + i * (kRowsAtOnce * kFewDim * 2);
#pragma unroll
    for (int k = 0; k < kFewDim / 16; ++k) {
      uint32_t a[4];
      load_matrices(a, keys + row_place<kFewDim>(lane & 15, 2 * k + (lane >> 4)));
      const uint32_t b0 = *reinterpret_cast<const uint32_t*>(q + 16 * k),
                     b1 = *reinterpret_cast<const uint32_t*>(q + 16 * k + 8);
      if constexpr (kBfloat)
        mma_bfloat(d, a[0], a[1], a[2], a[3], b0, b1);
      else
        mma_half(d, a[0], a[1], a[2], a[3], b0, b1);
    }
    score[0] = d[0] * (p.scale * kLog2e);
    score[1] = d[2] * (p.scale * kLog2e);
    return row_end - row - 16 * i;
  }

  static __device__ __forceinline__ int ordered(int x) { return x ^ (x >> 31 & INT32_MAX); }

  // Scores of all tokens, 16 a warp at a time, and the largest of each vector.
  __device__ __forceinline__ void find_scores() const {
    float top = -1e30f;
#pragma unroll 1
    for (int i = warp; i < 8 * tiles + rows / 16; i += kFewWarps) {
      float score[2];
      const int left = i < 8 * tiles ? score_codes(i, score) : score_rows(i - 8 * tiles, score);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (g + 8 * r >= left) score[r] = -INFINITY;
        top = fmaxf(top, score[r]);
      }
      float* to = at<float>(plan.layout.scores) + t * plan.layout.score_stride + (i >> 1) * 32;
      reinterpret_cast<float2*>(to)[2 * g + (i & 1)] = make_float2(score[0], score[1]);
    }
#pragma unroll
    for (int o = 4; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(kFull, top, o));
    if (lane < 4) atomicMax(largest + lane, ordered(__float_as_int(top)));
  }

  // Weights from scores: of pictures as integers of 16 bits, of rows in the model's type. Integers
  // are rounded at thresholds that differ from token to token, or all of many small weights beside
  // a large one could be lost.
  __device__ __forceinline__ void find_weights() const {
    const int vector = warp & 3, row_weights = plan.layout.weights + tiles * 8 * kTile;
    const float highest = __int_as_float(ordered(largest[vector])),
                dither = static_cast<float>(__brev(lane) >> 27) * (1.0f / 32) - (31.0f / 64);
#pragma unroll 1
    for (int i = warp >> 2; 4 * i < 4 * tiles + rows / 32; i += kFewWarps / 4) {
      const float4 s =
          at<float4>(plan.layout.scores)[vector * plan.layout.score_stride / 4 + i * 32 + lane];
      const float x[4] = {exp2_fast(s.x - highest), exp2_fast(s.y - highest),
                          exp2_fast(s.z - highest), exp2_fast(s.w - highest)};
      if (i < tiles) {
        uint32_t n[4], all = 0;  // integers in the low bits of floats
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          n[m] = __float_as_uint(fmaf(x[m], 65535.0f, dither) + kMagic);
          all += n[m];
        }
        const uint32_t low = __byte_perm(n[0], n[1], 0x5140),
                       high = __byte_perm(n[2], n[3], 0x5140);
        uint32_t* to = at<uint32_t>(plan.layout.weights) + i * 256 +
                       ((lane >> 2 & 1) * 32 + 8 * vector + (lane >> 3)) * 4 + t;
        to[0] = __byte_perm(low, high, 0x5410);
        to[16] = __byte_perm(low, high, 0x7632);
        all = reduce_sum(all - 4u * kMagicBits);
        if (lane == 0)
          atomicAdd(at<int>(plan.layout.totals) + 4 * (group_of(tile + i) - first_group) + vector,
                    static_cast<int>(all));
      } else if (4 * (i - tiles) + (lane >> 3) < rows / 32) {
        // Step 2a + (j >> 2) of 16 rows, lanes 4 column + (j & 3).
        uint2* to = at<uint2>(row_weights) + (8 * (i - tiles) + (lane >> 2)) * 32 + 8 * vector + t;
        const uint32_t a = pack(x[0], x[1]), b = pack(x[2], x[3]);
        const float2 c = unpack(a), d = unpack(b);
        to[0] = make_uint2(a, b);
        to[4] = make_uint2(pack(x[0] - c.x, x[1] - c.y), pack(x[2] - d.x, x[3] - d.y));
      }
    }
  }

  static __device__ __forceinline__ uint32_t pack(float x, float y) {
    return kBfloat ? pack_bfloat2(x, y) : pack_half2(x, y);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t x) {
    return kBfloat ? make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u))
                   : __half22float2(reinterpret_cast<const __half2&>(x));
  }

  // Sums of channels 16 c + g and + 8, c = warp % 8; each half of the warps takes every other tile.
  __device__ __forceinline__ void add_values() {
    const float now = __int_as_float(ordered(largest[t])), fade = exp2_fast(most - now);
    most = now;
    sum[0] *= fade, sum[1] *= fade, total *= fade;
    const int c = warp & 7, half = warp >> 3, end = tile + tiles;
#pragma unroll 1
    for (int first = tile, group = first_group; first < end; ++group) {
      const int last = min(end, (group + 1) * plan.group_tiles);
      int d[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int plane = p.value_bits - 1; plane >= 0; --plane) {
#pragma unroll
        for (int k = 0; k < 4; ++k) d[k] *= 2;
#pragma unroll 1
        for (int i = first - tile + half; i < last - tile; i += 2) {
          const uint32_t* words = at<uint32_t>(plan.layout.values) +
                                  (i * p.value_bits + plane) * 4 * kFewDim + (16 * c + g) * 4 + t;
          uint4 bytes[2];
          bytes[0] = at<uint4>(plan.layout.weights)[i * 64 + lane];
          bytes[1] = at<uint4>(plan.layout.weights)[i * 64 + 32 + lane];
          multiply<false>(d, words[0], words[32], bytes);
        }
      }
      const __half* params =
          at<__half>(plan.layout.value_params) + (group - first_group) * 2 * kFewDim + 16 * c + g;
      // The weights' sum counts once.
      const float all =
          half ? 0.0f
               : kUnit *
                     static_cast<float>(at<int>(plan.layout.totals)[4 * (group - first_group) + t]);
      total += all;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float x =
            fmaf(static_cast<float>(d[2 * r + 1]), 256.0f, static_cast<float>(d[2 * r]));
        sum[r] = fmaf(__half2float(params[8 * r]), x * kUnit,
                      fmaf(__half2float(params[kFewDim + 8 * r]), all, sum[r]));
      }
      first = last;
    }
    add_rows(c, half);
  }

  __device__ __forceinline__ void add_rows(int c, int half) {
    constexpr uint32_t kOnes = kBfloat ? 0x3f803f80u : 0x3c003c00u;
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f}, ones[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const uint2* weights = at<uint2>(plan.layout.weights + tiles * 8 * kTile) + lane;
    // Column k of a product's operand is row (k & 7) / 2 + 8 (k & 1) + 16 (k / 8) of a step.
    const int at_row = (lane >> 1 & 3) + 8 * (lane & 1) + 16 * (lane >> 4);
#pragma unroll 1
    for (int i = half; i < rows / 16; i += 2) {
      uint32_t a[4];
      load_matrices_transposed(
          a, value_rows() +
                 row_place<kFewDim>(32 * (i >> 1) + 4 * (i & 1) + at_row, 2 * c + (lane >> 3 & 1)));
      const uint2 w = weights[i * 32];
      if constexpr (kBfloat) {
        mma_bfloat(d, a[0], a[1], a[2], a[3], w.x, w.y);
        mma_bfloat(ones, kOnes, kOnes, kOnes, kOnes, w.x, w.y);
      } else {
        mma_half(d, a[0], a[1], a[2], a[3], w.x, w.y);
        mma_half(ones, kOnes, kOnes, kOnes, kOnes, w.x, w.y);
      }
    }
    sum[0] += d[0] + d[1];
    sum[1] += d[2] + d[3];
    total += ones[0] + ones[1];
  }

  // Stores the call's token, whose rows are in shared memory, by the last warp.
  __device__ __forceinline__ void append_own() const {
    const int i = text_count - row;  // among the rows
    if (!plan.appends || column || warp != kFewWarps - 1 || !is_token || i < 0 || i >= rows ||
        text_count >= min(row_end, p.text_capacity))
      return;
    const int64_t to = of_head(p.text_capacity, text_count);
    if (p.text_bits == 8) {
      append_code_row(p, true, b, head, 0, to);
      append_code_row(p, false, b, head, 0, to);
      return;
    }
    const uint32_t from = plan.layout.rows + (lane & 16 ? plan.rows * kFewDim * 2 : 0);
    static_cast<uint4*>(lane & 16 ? p.text_value : p.text_key)[to * 16 + (lane & 15)] =
        *at<uint4>(from + row_place<kFewDim>(i, lane & 15));
  }

  // Sends the warp's sums to the block that combines its channels: parts * 2 records for each of
  // its 8 / parts sets of 16 channels.
  __device__ __forceinline__ void send_sums() const {
    const int c = warp & 7, half = warp >> 3, rank = c & (plan.parts - 1);
    float* to = records + (((c >> plan.part_bits) * plan.parts + part) * 2 + half) * kRecord;
    send_to_block(to + 16 * t + 2 * g, sum[0], sum[1], arrived, rank);
    if (g == 0) send_to_block(to + 64 + 2 * t, most, total, arrived, rank);
  }

  // A thread for each part of each output.
  __device__ __forceinline__ void combine() const {
    static_assert(kFewThreads == kFewColumns * kFewDim);
    const int of = threadIdx.x & (plan.parts - 1), out = threadIdx.x >> plan.part_bits,
              vector = out >> 4 & 3, channels = out >> 6;
    const float* from = records + (channels * plan.parts + of) * 2 * kRecord;
    const float here = from[64 + 2 * vector];
    float highest = here;
#pragma unroll 1
    for (int o = 1; o < plan.parts; o <<= 1)
      highest = fmaxf(highest, __shfl_xor_sync(kFull, highest, o));
    const float weight = exp2_fast(here - highest);
    const int at_sum = 16 * vector + 2 * (out & 7) + (out >> 3 & 1), at_total = 65 + 2 * vector;
    float x = weight * (from[at_sum] + from[kRecord + at_sum]),
          all = weight * (from[at_total] + from[kRecord + at_total]);
#pragma unroll 1
    for (int o = 1; o < plan.parts; o <<= 1) {
      x += __shfl_xor_sync(kFull, x, o);
      all += __shfl_xor_sync(kFull, all, o);
    }
    if (of == 0 && column + vector < plan.ratio)
      store_output(vector, (channels << plan.part_bits | part) * 16 + (out & 15),
                   is_token ? __fdividef(x, all) : 0.0f);
  }

  __device__ __forceinline__ void store_output(int vector, int channel, float x) const {
    const int64_t at_head = static_cast<int64_t>(b) * p.query_heads + head * plan.ratio + column;
    store_float(p.output, (at_head + vector) * kFewDim + channel,
                kBfloat ? VKVX_BFLOAT16 : VKVX_FLOAT16, x);
  }

  // For a row without a slot.
  __device__ __forceinline__ void store_zeros() const {
    const int vector = threadIdx.x / kFewDim;
    if (part == 0 && column + vector < plan.ratio)
      store_output(vector, threadIdx.x % kFewDim, 0.0f);
  }
};

// Grid: (parts * sets of four query vectors, Hkv, B), clusters of the parts.
template <bool kBfloat>
__global__ void __launch_bounds__(kFewThreads)
    few_kernel(const __grid_constant__ VkvxParams p, const __grid_constant__ FewPlan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Block = FewBlock<kBfloat>;
  extern __shared__ __align__(128) char shared[];
  __shared__ __align__(16) uint16_t queries[kFewColumns][kFewDim + 8];
  __shared__ int largest[kFewColumns + kFewThreads];  // then the text counts of the slots
  __shared__ __align__(16) float records[kFewWarps * Block::kRecord];
  __shared__ uint64_t arrived;
  Block block(FewPart(p, plan, shared, queries, largest), records, &arrived);
  if (threadIdx.x == 0) expect_bytes(&arrived, sizeof(records));
  start_in_cluster();
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (!block.template find_row<kBfloat>()) {
    block.store_zeros();
    return;
  }
  block.find_part();
  while (true) {
    block.template load<kBfloat>();
    block.fold_queries();
    copy_wait<0>();
    __syncthreads();
    block.find_scores();
    __syncthreads();
    block.find_weights();
    __syncthreads();
    block.add_values();
    block.append_own();
    block.tile += block.tiles;
    block.row += block.rows;
    if (block.tile >= block.tile_end && block.row >= block.row_end) break;
    __syncthreads();
  }
  wait_at_cluster();  // until all blocks have started
  block.send_sums();
  wait_for_bytes(&arrived);
  block.combine();
#endif
}

}  // namespace vkvx
