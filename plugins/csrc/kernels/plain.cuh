// Attention without tensor cores, one block for each query vector: any head dim up to 512, any type
// and architecture, any number of positions.
#pragma once

#include "text_rows.cuh"

namespace vkvx {

// Number of each position among the row's tokens, or -1 on padding: [B, S]. One block per row. With
// the mask `run` also the last position that each one sees: itself if it is text, else the one
// before the next text token.
__global__ void rank_tokens_kernel(const __grid_constant__ VkvxParams p, int* rank, int* run_end) {
  const int b = blockIdx.x, S = p.positions;
  int* mine = rank + static_cast<int64_t>(b) * S;
  const int* text = p.text_index + static_cast<int64_t>(b) * p.text_entries;
  __shared__ int sums[32], text_sums[32];
  __shared__ int before, text_before;
  for (int i = threadIdx.x; i < S; i += blockDim.x) mine[i] = 0;
  if (threadIdx.x == 0) before = text_before = 0;
  __syncthreads();
  if (p.slot[b] >= 0) {
    for (int i = threadIdx.x; i < p.visual_entries; i += blockDim.x) {
      const int at = p.visual_index[static_cast<int64_t>(b) * p.visual_entries + i];
      if (at >= 0 && at < S) mine[at] = 2;
    }
    for (int i = threadIdx.x; i < p.text_entries; i += blockDim.x) {
      const int at = text[i];
      if (at >= 0 && at < S) mine[at] = 1;
    }
  }
  __syncthreads();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int base = 0; base < S; base += blockDim.x) {
    const int i = base + threadIdx.x;
    const bool token = i < S && mine[i], is_text = i < S && mine[i] == 1;
    const unsigned votes = __ballot_sync(kFull, token), text_votes = __ballot_sync(kFull, is_text),
                   below = (1u << lane) - 1;
    if (lane == 0) sums[warp] = __popc(votes), text_sums[warp] = __popc(text_votes);
    __syncthreads();
    int at = before + __popc(votes & below), texts = text_before + __popc(text_votes & below);
    for (int w = 0; w < warp; ++w) at += sums[w], texts += text_sums[w];
    if (i < S) mine[i] = token ? at : -1;
    if (i < S && run_end != nullptr) {
      const int next = texts < p.text_entries ? text[texts] : -1;
      run_end[static_cast<int64_t>(b) * S + i] = is_text ? i : next < 0 ? S - 1 : next - 1;
    }
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) before = at + token, text_before = texts + is_text;
    __syncthreads();
  }
}

constexpr int kPlainThreads = 128;
constexpr int kPlainMaxDim = VKVX_MAX_HEAD_DIM;

__global__ void __launch_bounds__(kPlainThreads)
    plain_kernel(const __grid_constant__ VkvxParams p, const int* rank, const int* run_end) {
  const int s = blockIdx.x, head = blockIdx.y, b = blockIdx.z, tid = threadIdx.x;
  const int D = p.head_dim, S = p.positions, kv = head / (p.query_heads / p.kv_heads);
  const int64_t out = ((static_cast<int64_t>(b) * p.query_heads + head) * S + s) * D;
  const int slot = p.slot[b];
  if (slot < 0 || rank[static_cast<int64_t>(b) * S + s] < 0) {
    for (int c = tid; c < D; c += kPlainThreads) store_float(p.output, out + c, p.dtype, 0.0f);
    return;
  }
  const Sight seen =
      sight_of(p, b, s, run_end == nullptr ? s : run_end[static_cast<int64_t>(b) * S + s]);
  __shared__ float query[kPlainMaxDim], folded[kPlainMaxDim], weights[kPlainThreads],
      scratch[kPlainThreads / 32];
  for (int c = tid; c < D; c += kPlainThreads)
    query[c] =
        load_float(p.query,
                   b * p.query_stride[0] + head * p.query_stride[1] + s * p.query_stride[2] + c,
                   p.dtype) *
        p.scale;
  const int groups = p.visual_capacity ? p.visual_capacity / p.group_size : 0, words = D / 32;
  const int64_t slot_head = static_cast<int64_t>(slot) * p.kv_heads + kv,
                tiles = p.visual_capacity / kTile;
  const __half* key_params =
      static_cast<const __half*>(p.visual_key_params) + slot_head * groups * 3 * D;
  const __half* value_params =
      static_cast<const __half*>(p.visual_value_params) + slot_head * groups * 2 * D;
  const int* counts = p.visual_count + static_cast<int64_t>(slot) * groups;
  auto reduce = [&](float x, bool maximum) {  // over the block
    x = maximum ? warp_max(x) : warp_sum(x);
    __syncthreads();
    if ((tid & 31) == 0) scratch[tid >> 5] = x;
    __syncthreads();
    float y = scratch[0];
    for (int w = 1; w < kPlainThreads / 32; ++w)
      y = maximum ? fmaxf(y, scratch[w]) : y + scratch[w];
    return y;
  };
  float most = -1e30f, total = 0.0f, sum[kPlainMaxDim / kPlainThreads] = {};
  // Weights of up to 128 tokens, one per thread (score -inf: none), then their values: value(i, c)
  // of token i, channel c.
  auto attend = [&](float score, int count, auto value) {
    if (p.softcap > 0.0f) score = bounded_score(score, p.softcap);
    const float top = reduce(score, true), now = fmaxf(most, top), fade = expf(most - now);
    const float weight = expf(score - now);
    weights[tid] = weight;
    total = total * fade + reduce(weight, false);
    most = now;
    for (int n = 0; n * kPlainThreads + tid < D; ++n) {
      const int c = n * kPlainThreads + tid;
      float x = sum[n] * fade;
      for (int i = 0; i < count; ++i)
        if (weights[i] > 0.0f) x = fmaf(weights[i], value(i, c), x);
      sum[n] = x;
    }
    __syncthreads();
  };
  float low = INFINITY, high = -INFINITY;
  const bool affine = p.correction == VKVX_CORRECTION_AFFINE;
  for (int pass = affine ? 0 : 1; pass < 2; ++pass) {
    const float slope =
        affine && pass && high > low ? fmaxf(0.0f, (high - p.tau - low) / (high - low)) : 1.0f;
    for (int group = 0; group < groups && counts[group] > 0; ++group) {
      const __half* k = key_params + static_cast<int64_t>(group) * 3 * D;
      const __half* v = value_params + static_cast<int64_t>(group) * 2 * D;
      float bias = 0.0f, spread = 0.0f;
      __syncthreads();
      for (int c = tid; c < D; c += kPlainThreads) {
        folded[c] = query[c] * __half2float(k[c]);
        bias = fmaf(query[c], __half2float(k[D + c]), bias);
        const float error = query[c] * __half2float(k[2 * D + c]);
        spread = fmaf(error, error, spread);
      }
      bias = reduce(bias, false);
      if (p.correction == VKVX_CORRECTION_EXPECTED)
        bias += expected_correction(0.5f * reduce(spread, false), p.correction_limit);
      for (int first = 0; first < counts[group]; first += kTile) {
        const int count = min(kTile, counts[group] - first),
                  hidden = seen.visual - group * p.group_size - first;
        if (hidden >= count) continue;
        const int64_t tile =
            slot_head * tiles + (static_cast<int64_t>(group) * p.group_size + first) / kTile;
        const int* key = p.visual_key + tile * p.key_bits * kTile * words;
        const int* value = p.visual_value + tile * p.value_bits * D * 4;
        float score = -INFINITY;
        if (tid < count && tid >= hidden) {
          score = bias;
          for (int c = 0; c < D; ++c)
            score = fmaf(folded[c],
                         gather_code(key + tid * words + c / 32, kTile * words, p.key_bits, c % 32),
                         score);
        }
        if (pass == 0) {
          high = fmaxf(high, reduce(score, true));
          low = -fmaxf(-low, reduce(tid < count ? -score : -INFINITY, true));
          continue;
        }
        if (affine && tid < count) score = low + (score - low) * slope;
        attend(score, count, [&](int i, int c) {
          const int code = gather_code(value + c * 4 + i / 32, D * 4, p.value_bits, i % 32);
          return fmaf(__half2float(v[c]), static_cast<float>(code), __half2float(v[D + c]));
        });
      }
    }
  }
  // Rows from `begin` on: key(row, c) and value(row, c) give channel c.
  auto attend_rows = [&](auto key, auto value, int begin, int rows, bool own) {
    for (int first = begin; first < rows; first += kPlainThreads) {
      const int count = min(kPlainThreads, rows - first), row = first + tid;
      float score = -INFINITY;
      if (tid < count && (!own || rank[static_cast<int64_t>(b) * S + row] >= 0)) {
        score = 0.0f;
        for (int c = 0; c < D; ++c) score = fmaf(query[c], key(row, c), score);
      }
      attend(score, count, [&](int i, int c) { return value(first + i, c); });
    }
  };
  auto text = [&](const void* rows) {
    return [&p, rows, D, first = slot_head * p.text_capacity](int row, int c) {
      return p.text_bits == 8 ? load_code(rows, first + row, D, c, p.dtype)
                              : load_float(rows, (first + row) * D + c, p.dtype);
    };
  };
  auto own = [&](const void* rows, const int64_t (&stride)[3]) {
    return [&p, rows, base = b * stride[0] + kv * stride[1], step = stride[2]](int row, int c) {
      return load_float(rows, base + row * step + c, p.dtype);
    };
  };
  __syncthreads();
  attend_rows(text(p.text_key), text(p.text_value), seen.text, p.text_count[slot], false);
  attend_rows(own(p.key, p.key_stride), own(p.value, p.value_stride), seen.first, seen.last + 1,
              true);
  for (int n = 0; n * kPlainThreads + tid < D; ++n)
    store_float(p.output, out + n * kPlainThreads + tid, p.dtype, sum[n] / total);
}

}  // namespace vkvx
