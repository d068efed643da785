// Decode attention on rows: cached text, of 16 or 8 bits, and the call's own tokens.
#pragma once

#include "text_rows.cuh"

namespace vkvx {

constexpr int kRowsAtOnce = 16;

// What a warp has found so far, in shared memory: sums [columns][stride], the score that weights
// are relative to, and the sum of the weights. Sums of columns past `columns` are dropped.
struct WarpResult {
  float* sums;
  int stride;
  float* most;   // [8]
  float* total;  // [8]
  int columns;
  bool empty;
  float fade[2], gain[2];

  // Columns 2t and 2t + 1 in lane 4g + t.
  __device__ __forceinline__ void begin(const float (&m)[2], const float (&l)[4], float unit) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float before = empty ? -1e30f : most[2 * t + c];
      const float now = fmaxf(before, m[c]);
      fade[c] = exp2_fast(before - now);
      gain[c] = exp2_fast(m[c] - now);
      const float sum = fmaf(l[c] * unit, gain[c], empty ? 0.0f : total[2 * t + c] * fade[c]);
      __syncwarp();
      if ((threadIdx.x & 31) < 4) {
        most[2 * t + c] = now;
        total[2 * t + c] = sum;
      }
    }
  }

  __device__ __forceinline__ void add(int channel, float x, float y) {
    const int t = threadIdx.x & 3;
    const float new_sums[2] = {x, y};
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (2 * t + c < columns) {
        float* at = sums + (2 * t + c) * stride + channel;
        *at = fmaf(new_sums[c], gain[c], empty ? 0.0f : *at * fade[c]);
      }
  }

  // One column per lane; m and l are the same in all lanes of a column, one of which is its
  // `writer`.
  __device__ __forceinline__ void begin_column(int column, float m, float l, bool writer) {
    const float before = empty ? -1e30f : most[column];
    const float now = fmaxf(before, m);
    fade[0] = exp2_fast(before - now);
    gain[0] = exp2_fast(m - now);
    const float sum = fmaf(l, gain[0], empty ? 0.0f : total[column] * fade[0]);
    __syncwarp();
    if (writer) {
      most[column] = now;
      total[column] = sum;
    }
  }

  __device__ __forceinline__ void add_to_column(int column, int channel, float x) {
    if (column >= columns) return;
    float* at = sums + column * stride + channel;
    *at = fmaf(x, gain[0], empty ? 0.0f : *at * fade[0]);
  }

  // Channels channel..channel + 3, a multiple of 4.
  __device__ __forceinline__ void add_four(int column, int channel, const float (&x)[4]) {
    if (column >= columns) return;
    float4* at = reinterpret_cast<float4*>(sums + column * stride + channel);
    const float4 old = empty ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *at;
    *at = make_float4(fmaf(x[0], gain[0], old.x * fade[0]), fmaf(x[1], gain[0], old.y * fade[0]),
                      fmaf(x[2], gain[0], old.z * fade[0]), fmaf(x[3], gain[0], old.w * fade[0]));
  }

  __device__ __forceinline__ void end() {
    empty = false;
    __syncwarp();
  }
};

// Rows of one KV head: where its keys and values of row 0 start, how far apart rows are, and
// whether they are codes.
struct RowSource {
  const char* key;
  const char* value;
  int64_t key_stride, value_stride;  // in bytes
  bool coded;
};

// Where chunk `chunk` of 8 channels of row `row` lies in shared memory, in bytes.
template <int kDim>
__device__ __forceinline__ uint32_t row_place(int row, int chunk) {
  constexpr int kChunks = kDim / 8;
  return (row * kChunks + (chunk ^ (row & 7 & (kChunks - 1)))) * 16;
}

// 16 rows of codes into shared memory as numbers of the model's type: keys to `key_buffer`, values
// to `value_buffer`. They begin at multiples of 4 bytes only. A function of its own, so that it
// takes no registers from the loop over tiles.
template <bool kBfloat, int kDim>
static __device__ __noinline__ void load_code_rows(const int* keys, const int* values,
                                                   uint32_t present, int dim, uint32_t key_buffer,
                                                   uint32_t value_buffer) {
  constexpr int kChunks = kDim / 8, kSteps = kRowsAtOnce * kChunks / 32, kAtOnce = 8;
  const int lane = threadIdx.x & 31, r = lane & 15;
  // Lane r has the scale of key r, lane 16 + r that of value r.
  int scales = 0;
  if (present >> r & 1) scales = (lane < 16 ? keys : values)[r * text_words(dim) + dim / 4];
#pragma unroll 1
  for (int step = 0; step < kSteps; step += kAtOnce) {
    uint2 key[kAtOnce], value[kAtOnce];
    auto row_of = [&](int i) { return ((step + i) * 32 + lane) / kChunks; };
    auto chunk_of = [&](int i) { return ((step + i) * 32 + lane) % kChunks; };
    auto load = [&](const int* rows, int i) {
      if (!(present >> row_of(i) & 1) || chunk_of(i) >= dim / 8) return make_uint2(0, 0);
      const int* words = rows + row_of(i) * text_words(dim) + 2 * chunk_of(i);
      return make_uint2(words[0], words[1]);
    };
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      key[i] = load(keys, i);
      value[i] = load(values, i);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t to = row_place<kDim>(row_of(i), chunk_of(i));
      const int key_scale = __shfl_sync(kFull, scales, row_of(i)),
                value_scale = __shfl_sync(kFull, scales, 16 + row_of(i));
      store_eight<kBfloat>(key_buffer + to, key[i], scale_of(key_scale));
      store_eight<kBfloat>(value_buffer + to, value[i], scale_of(value_scale));
    }
  }
}

// Rows of `dim` channels, at most kDim; those that do not exist are zeros.
template <int kDim>
struct RowsEngine {
  static constexpr int kChunks = kDim / 8;               // of 16 bytes, per row
  static constexpr int kBytes = kRowsAtOnce * kDim * 2;  // of the keys in the buffer, then values
  static constexpr int kWeightShift = 11;
  static constexpr float kMargin = 4.0f;

  int dim;
  float sum[kDim / 16][4], total[4], most[2];
  uint32_t query[kDim / 16][2];

  __device__ __forceinline__ explicit RowsEngine(int d) : dim(d) {}

  __device__ __forceinline__ static int lane() { return threadIdx.x & 31; }

  // queries: shared memory, [columns][dim + 8] of the model's type.
  __device__ __forceinline__ void start(const uint16_t* queries, int columns) {
    const int g = lane() >> 2, t = lane() & 3;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        query[i][r] = g < columns && 16 * i < dim
                          ? *reinterpret_cast<const uint32_t*>(queries + g * (dim + 8) + 16 * i +
                                                               8 * r + 2 * t)
                          : 0u;
    }
    total[0] = total[1] = total[2] = total[3] = 0.0f;
    most[0] = most[1] = -1e30f;
  }

  __device__ __forceinline__ static uint32_t place(int row, int chunk) {
    return row_place<kDim>(row, chunk);
  }

  // Rows [first, first + 16) into shared memory.
  __device__ __forceinline__ void load_rows(const RowSource& source, int first, uint32_t present,
                                            uint32_t buffer, uint32_t value_buffer) const {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce * kChunks / 32; ++i) {
      const int row = (i * 32 + lane()) / kChunks, chunk = (i * 32 + lane()) % kChunks;
      const bool valid = (present >> row & 1) && chunk < dim / 8;
      const int64_t at = valid ? first + row : 0;
      const int from = valid ? chunk * 16 : 0;
      copy_async(buffer + place(row, chunk), source.key + at * source.key_stride + from, valid);
      copy_async(value_buffer + place(row, chunk), source.value + at * source.value_stride + from,
                 valid);
    }
    copy_commit();
    copy_wait<0>();
  }

  // Attend to rows [first, first + 16): bit r of `present` tells whether row first + r exists, that
  // of `seen[c]` whether column 2t + c sees it. Scores are bounded, if kBounded and `bound` is
  // not 0.
  template <bool kBfloat, bool kBounded>
  __device__ __forceinline__ void attend(const RowSource& source, int first, uint32_t present,
                                         const uint32_t (&seen)[2], float scale, float bound,
                                         uint32_t buffer) {
    const uint32_t value_buffer = buffer + kBytes;
    __syncwarp();
    if (source.coded)
      load_code_rows<kBfloat, kDim>(
          reinterpret_cast<const int*>(source.key + first * source.key_stride),
          reinterpret_cast<const int*>(source.value + first * source.value_stride), present, dim,
          buffer, value_buffer);
    else
      load_rows(source, first, present, buffer, value_buffer);
    __syncwarp();
    const int g = lane() >> 2;
    float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      if (16 * i >= dim) continue;
      uint32_t a[4];
      load_matrices(a, buffer + place(lane() & 15, 2 * i + (lane() >> 4)));
      if constexpr (kBfloat)
        mma_bfloat(s, a[0], a[1], a[2], a[3], query[i][0], query[i][1]);
      else
        mma_half(s, a[0], a[1], a[2], a[3], query[i][0], query[i][1]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = g + 8 * (j >> 1);
      s[j] *= scale;
      if (kBounded && bound > 0.0f) s[j] = bounded_score(s[j], bound);
      if (!(present & seen[j & 1] & (1u << row))) s[j] = -INFINITY;
    }
    float fade[2];
    bool grew = false;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float top = fmaxf(s[c], s[2 + c]);
#pragma unroll
      for (int o = 4; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(kFull, top, o));
      const bool mine = top > most[c] + kMargin;
      const float now = mine ? top : most[c];
      fade[c] = exp2_fast(most[c] - now);
      most[c] = now;
      grew |= mine;
    }
    if (uniform(grew)) {
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] *= fade[j & 1];
#pragma unroll
      for (int j = 0; j < 4; ++j) total[j] *= fade[j & 1];
    }
    uint32_t weight[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float x = exp2_fast(s[2 * r] - most[0] + kWeightShift),
                  y = exp2_fast(s[2 * r + 1] - most[1] + kWeightShift);
      weight[r] = transpose_matrix(kBfloat ? pack_bfloat2(x, y) : pack_half2(x, y));
    }
    constexpr uint32_t kOnes = kBfloat ? 0x3f803f80u : 0x3c003c00u;
    if constexpr (kBfloat)
      mma_bfloat(total, kOnes, kOnes, kOnes, kOnes, weight[0], weight[1]);
    else
      mma_half(total, kOnes, kOnes, kOnes, kOnes, weight[0], weight[1]);
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      if (16 * i >= dim) continue;
      uint32_t a[4];
      load_matrices_transposed(
          a, value_buffer + place((lane() & 7) + 8 * (lane() >> 4), 2 * i + (lane() >> 3 & 1)));
      if constexpr (kBfloat)
        mma_bfloat(sum[i], a[0], a[1], a[2], a[3], weight[0], weight[1]);
      else
        mma_half(sum[i], a[0], a[1], a[2], a[3], weight[0], weight[1]);
    }
  }

  __device__ __forceinline__ void finish(WarpResult& result) {
    constexpr float kUnit = 1.0f / (1 << kWeightShift);
    result.begin(most, total, kUnit);
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      if (16 * i >= dim) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        result.add(16 * i + 8 * r + (lane() >> 2), sum[i][2 * r] * kUnit,
                   sum[i][2 * r + 1] * kUnit);
    }
    result.end();
  }
};

}  // namespace vkvx
