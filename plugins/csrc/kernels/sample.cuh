// Choice of each row's next token from its logits, a block for a row. Weights of tokens are
// integers, so that a sum does not depend on the order in which it is taken: rows get what they get
// alone.
#pragma once

#include "sample_parts.cuh"

namespace vkvx {

// The bin at which the sum of a histogram, from the likeliest tokens on, reaches `target`, and what
// comes before it.
template <bool kByWeight>
__device__ void find_bin(uint64_t target, SampleShared& s) {
  constexpr int kEach = kBins / kSampleThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Measure own[kEach], sum{0, 0};
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum = sum + (own[i] = s.bins.measure(threadIdx.x * kEach + i));
  Measure before = sum;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const Measure other = before.shuffle_up(o);
    if (lane >= o) before = before + other;
  }
  if (lane == 31) s.measures[0][warp] = before;
  before = before - sum;
  __syncthreads();
  for (int i = 0; i < warp; ++i) before = before + s.measures[0][i];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const Measure through = before + own[i];
    if (before.of<kByWeight>() < target && target <= through.of<kByWeight>())
      s.found = {static_cast<int>(threadIdx.x) * kEach + i, before, own[i]};
    before = through;
  }
  __syncthreads();
}

// The likeliest tokens among those whose key is at least `least`: the greatest key at which their
// number, or their weight, reaches `target`. Tokens as likely as the last one are kept, too.
template <bool kByWeight, class T>
__device__ uint32_t narrow(const RowScores<T>& row, const Scale& scale, uint32_t least,
                           uint64_t target, SampleShared& s) {
  for (int i = threadIdx.x; i < kBins; i += kSampleThreads) s.bins.clear(i);
  __syncthreads();
  row.visit_all([&](int, float score) {
    if (key_of(score) >= least)
      s.bins.template add<kByWeight>(scale.bin(score), scale.weight(score));
  });
  __syncthreads();
  find_bin<kByWeight>(target, s);
  const Found found = s.found;
  const bool held = found.inside.count <= kCandidates;
  if (held) {
    if (threadIdx.x == 0) s.used = 0;
    __syncthreads();
    row.visit_all([&](int, float score) {
      if (key_of(score) >= least && scale.bin(score) == found.bin)
        s.candidates[atomicAdd(&s.used, 1)] = key_of(score);
    });
    __syncthreads();
  }
  // Between these keys lies the one that is looked for; all tokens of other bins are on one side.
  uint32_t low = least, high = key_of(scale.best) + 1;
  for (int half = 0; high - low > 1; half ^= 1) {
    const uint32_t middle = low + (high - low) / 2;
    Measure reached{0, 0};
    const auto measure = [&](uint32_t key, float score) {
      if (key >= middle) reached = reached + Measure{1, kByWeight ? scale.weight(score) : 0};
    };
    if (held)
      for (int i = threadIdx.x; i < found.inside.count; i += kSampleThreads)
        measure(s.candidates[i], score_of(s.candidates[i]));
    else
      row.visit_all([&](int, float score) {
        if (scale.bin(score) == found.bin) measure(key_of(score), score);
      });
    reached = found.before + block_measure(reached, s, half);
    (reached.of<kByWeight>() >= target ? low : high) = middle;
  }
  __syncthreads();
  return low;
}

// Weight of the tokens whose key is at least `least`, in all threads.
template <class T>
__device__ uint64_t total_weight(const RowScores<T>& row, const Scale& scale, uint32_t least,
                                 SampleShared& s) {
  Measure sum{0, 0};
  row.visit_all([&](int, float score) { sum.weight += scale.weight_from(least, score); });
  sum = block_measure(sum, s, 0);
  __syncthreads();
  return sum.weight;
}

// The token at which the sum of weights, in the order of the vocabulary, goes past a random part of
// the whole. In lane 0 of the warp that finds it; others get -1.
template <class T>
__device__ int draw(const RowScores<T>& row, const Scale& scale, uint32_t least, uint64_t random,
                    SampleShared& s) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = static_cast<int>(divide_up(divide_up(row.vocab, kGroup), kSampleThreads)) * 32;
  const int first = warp * groups, last = first + groups;
  Measure sum{0, 0};
  row.visit(first + lane, last, 32,
            [&](int, float score) { sum.weight += scale.weight_from(least, score); });
  sum = warp_measure(sum);
  if (lane == 0) s.measures[0][warp] = sum;
  __syncthreads();
  uint64_t total = 0, before = 0;
  for (int i = 0; i < kSampleWarps; ++i) {
    before = i == warp ? total : before;
    total += s.measures[0][i].weight;
  }
  const uint64_t wanted = __umul64hi(random, total);
  if (wanted < before || wanted >= before + sum.weight) return -1;
  for (int group = first; group < last; group += 32) {
    uint64_t own[kGroup] = {}, through = 0;
    row.visit(group + lane, group + lane + 1, 1, [&](int i, float score) {
      own[i % kGroup] = through += scale.weight_from(least, score);
    });
    const uint64_t all = through;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const uint64_t other = __shfl_up_sync(kFull, through, o);
      through += lane >= o ? other : 0;
    }
    const unsigned past = __ballot_sync(kFull, before + through > wanted);
    if (past == 0) {
      before += __shfl_sync(kFull, through, 31);
      continue;
    }
    int token = 0;
#pragma unroll
    for (int i = kGroup - 1; i >= 0; --i)
      if (before + through - all + own[i] > wanted) token = (group + lane) * kGroup + i;
    token = __shfl_sync(kFull, token, __ffs(past) - 1);
    return lane == 0 ? token : -1;
  }
  return -1;
}

// Of a token, by the row's logits as they are.
template <class T>
__device__ float log_probability(const RowScores<T>& row, int token, SampleShared& s) {
  float best = -INFINITY, sum = 0.0f;
  for (int pass = 0; pass < 2; ++pass) {
    float part = pass ? 0.0f : -INFINITY;
    row.raw().visit_all(
        [&](int, float x) { part = pass ? part + expf(x - best) : fmaxf(part, x); });
    part = pass ? warp_sum(part) : warp_max(part);
    __syncthreads();
    if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = part;
    __syncthreads();
    part = s.sums[threadIdx.x % 32];
    (pass ? sum : best) = pass ? warp_sum(part) : warp_max(part);
  }
  return static_cast<float>(row.logits[token]) - best - logf(sum);
}

// The likeliest token, the first of equals, and its score; -1 where a score is NaN or infinite, -2
// where all are excluded.
template <class T>
__device__ int likeliest(const RowScores<T>& row, float* score, SampleShared& s) {
  uint64_t best = 0;
  row.visit_all([&](int i, float x) {
    const uint64_t key = isnan(x) ? 0xffffffffu : key_of(x);
    const uint64_t rank = key << 32 | ~static_cast<uint32_t>(i);
    best = rank > best ? rank : best;
  });
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
    for (int o = 16; o; o >>= 1) {
      const uint64_t other = __shfl_xor_sync(kFull, best, o);
      best = other > best ? other : best;
    }
    if (pass) break;
    if (threadIdx.x % 32 == 0) s.best[threadIdx.x / 32] = best;
    __syncthreads();
    best = s.best[threadIdx.x % 32];
  }
  *score = score_of(static_cast<uint32_t>(best >> 32));
  if (!isfinite(*score)) return *score == -INFINITY ? -2 : -1;
  return static_cast<int>(~static_cast<uint32_t>(best));
}

template <class T>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(VkvxSampleParams p) {
  __shared__ SampleShared s;
  const int b = blockIdx.x, slot = p.slot[b];
  if (slot < 0) return;
  const VkvxSampleRow options = p.options[b];
  const int64_t words = int64_t{slot} * divide_up(p.vocab, 32);
  const RowScores<T> row{static_cast<const T*>(p.logits) + b * p.logits_stride,
                         options.repetition_penalty == 1.0f ? nullptr : p.seen + words,
                         p.excluded == nullptr ? nullptr : p.excluded + words,
                         options.repetition_penalty, p.vocab};
  float best;
  int token = likeliest(row, &best, s);
  bool writes = threadIdx.x == 0;
  if (token >= 0 && options.temperature > 0.0f) {
    const Scale scale{best, options.temperature};
    uint32_t least = 0;
    if (options.top_k > 0 && options.top_k < p.vocab)
      least = narrow<false>(row, scale, least, options.top_k, s);
    if (options.top_p < 1.0f) {
      const double all = total_weight(row, scale, least, s);
      const auto target = static_cast<unsigned long long>(ceil(options.top_p * all));
      least = narrow<true>(row, scale, least, max(1ull, target), s);
    }
    token = draw(row, scale, least, philox(options.seed, uint64_t{options.step} + 1), s);
    writes = token >= 0;
  }
  if (writes) s.token = token;
  __syncthreads();
  token = s.token;
  if (p.log_probability != nullptr && options.wants_log_probability) {
    const float found = token < 0 ? NAN : log_probability(row, token, s);
    if (threadIdx.x == 0) p.log_probability[b] = found;
  }
  if (threadIdx.x) return;
  p.token[b] = token;
  if (p.last_token != nullptr) p.last_token[slot] = max(token, 0);
  if (token >= 0) p.seen[words + token / 32] |= 1u << (token % 32);
}

__global__ void last_tokens_kernel(int rows, const int32_t* slot, const int32_t* last_token,
                                   int32_t* input_ids) {
  const int b = blockIdx.x * blockDim.x + threadIdx.x;
  if (b < rows && slot[b] >= 0 && input_ids[b] < 0) input_ids[b] = last_token[slot[b]];
}

}  // namespace vkvx
