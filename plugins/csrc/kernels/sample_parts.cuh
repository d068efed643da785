// What the choice of tokens is made of: random numbers, order and weights of scores, and how a
// block reads and sums the scores of a row.
#pragma once

#include "common.cuh"

namespace vkvx {

constexpr int kSampleThreads = 1024, kSampleWarps = kSampleThreads / 32;
constexpr int kGroup = 4;                      // neighbours that a thread reads together
constexpr int kBins = 2048, kBinsPerNat = 64;  // of a histogram of scores
constexpr int kCandidates = 4096;              // scores that are searched in shared memory
constexpr float kUnitWeight = 274877906944;    // 2^38, of the likeliest token
constexpr int kPart = 13;                      // bits of a weight that a bin sums in 32 bits

// Numbers in the order of the floats; neither zero is the larger.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// First number of Philox4x64-10 for a key and a counter: Salmon et al., Parallel random numbers: as
// easy as 1, 2, 3 (SC11).
__device__ inline uint64_t philox(uint64_t seed, uint64_t counter) {
  constexpr uint64_t kFirst = 0xD2E7470EE14C6C93, kSecond = 0xCA5A826395121157;
  uint64_t a = counter, b = 0, c = 0, d = 0, low = seed, high = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a_high = __umul64hi(kFirst, a), c_high = __umul64hi(kSecond, c);
    const uint64_t b_next = kSecond * c, d_next = kFirst * a;
    a = c_high ^ b ^ low;
    c = a_high ^ d ^ high;
    b = b_next, d = d_next;
    low += 0x9E3779B97F4A7C15, high += 0xBB67AE8584CAA73B;
  }
  return a;
}

// How many tokens, and how much they weigh together.
struct Measure {
  uint32_t count;
  uint64_t weight;

  __device__ Measure operator+(Measure other) const {
    return {count + other.count, weight + other.weight};
  }
  __device__ Measure operator-(Measure other) const {
    return {count - other.count, weight - other.weight};
  }
  __device__ Measure shuffle_up(int lanes) const {
    return {__shfl_up_sync(kFull, count, lanes), __shfl_up_sync(kFull, weight, lanes)};
  }
  template <bool kByWeight>
  __device__ uint64_t of() const {
    return kByWeight ? weight : count;
  }
};

// Weights and bins of scores, by how far they are below the best one.
struct Scale {
  float best, temperature;

  __device__ float distance(float score) const { return __fdiv_rn(score - best, temperature); }
  __device__ uint64_t weight(float score) const {
    return static_cast<uint64_t>(expf(distance(score)) * kUnitWeight);
  }
  __device__ uint64_t weight_from(uint32_t least, float score) const {
    return key_of(score) < least ? 0 : weight(score);
  }
  // A greater score has no greater bin. The last bin holds all that is far below.
  __device__ int bin(float score) const {
    return static_cast<int>(fminf(-distance(score) * kBinsPerNat, kBins - 1.0f));
  }
};

// A histogram: count, and three parts of the weight, so that sums of 2^19 tokens fit into 32 bits.
struct Bins {
  uint32_t parts[4][kBins];

  __device__ void clear(int bin) {
    for (auto& part : parts) part[bin] = 0;
  }
  template <bool kByWeight>
  __device__ void add(int bin, uint64_t weight) {
    atomicAdd(&parts[3][bin], 1u);
    if (kByWeight)
      for (int i = 0; i < 3; ++i) {
        const auto part = static_cast<uint32_t>(weight >> (i * kPart)) & ((1u << kPart) - 1);
        if (part) atomicAdd(&parts[i][bin], part);
      }
  }
  __device__ Measure measure(int bin) const {
    uint64_t weight = 0;
    for (int i = 0; i < 3; ++i) weight += uint64_t{parts[i][bin]} << (i * kPart);
    return {parts[3][bin], weight};
  }
};

// A bin, what comes before it, and what is in it.
struct Found {
  int bin;
  Measure before, inside;
};

struct SampleShared {
  union {
    Bins bins;
    uint32_t candidates[kCandidates];  // keys
  };
  Found found;
  Measure measures[2][kSampleWarps];
  uint64_t best[kSampleWarps];
  float sums[kSampleWarps];
  uint32_t used;
  int token;
};

// The logits of a row, as the options of the row change them.
template <class T>
struct RowScores {
  const T* logits;
  const uint32_t *seen, *excluded;  // a bit for each token; null: none
  float penalty;
  int vocab;

  __device__ RowScores raw() const { return {logits, nullptr, nullptr, 1.0f, vocab}; }

  // Calls visit(token, score) for the tokens of groups in [first, last), `step` apart.
  template <class Visit>
  __device__ void visit(int first, int last, int step, Visit&& visit) const {
    constexpr int kLoads = 4;
    struct alignas(kGroup * sizeof(T)) Loaded {
      T x[kGroup];
    };
    const int whole = vocab / kGroup;
    const bool aligned = reinterpret_cast<uintptr_t>(logits) % sizeof(Loaded) == 0;
    for (int group = first; group < last; group += kLoads * step) {
      Loaded loaded[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int at = group + j * step;
        if (at >= last || at >= whole) continue;
        if (aligned)
          loaded[j] = reinterpret_cast<const Loaded*>(logits)[at];
        else
#pragma unroll
          for (int i = 0; i < kGroup; ++i) loaded[j].x[i] = logits[at * kGroup + i];
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int at = group + j * step, token = at * kGroup;
        if (at >= last || token >= vocab) continue;
        const uint32_t lower = seen == nullptr ? 0 : seen[token / 32] >> (token % 32),
                       never = excluded == nullptr ? 0 : excluded[token / 32] >> (token % 32);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (token + i >= vocab) break;
          float x = static_cast<float>(at < whole ? loaded[j].x[i] : logits[token + i]);
          if (lower >> i & 1) x = x > 0.0f ? __fdiv_rn(x, penalty) : x * penalty;
          visit(token + i, never >> i & 1 ? -INFINITY : x);
        }
      }
    }
  }

  template <class Visit>
  __device__ void visit_all(Visit&& visit) const {
    this->visit(threadIdx.x, (vocab + kGroup - 1) / kGroup, kSampleThreads, visit);
  }
};

__device__ __forceinline__ Measure warp_measure(Measure m) {
#pragma unroll
  for (int o = 16; o; o >>= 1)
    m = m + Measure{__shfl_xor_sync(kFull, m.count, o), __shfl_xor_sync(kFull, m.weight, o)};
  return m;
}

// Sum over the block, in all threads. Calls must alternate between the two halves of `measures`.
__device__ inline Measure block_measure(Measure m, SampleShared& s, int half) {
  m = warp_measure(m);
  if (threadIdx.x % 32 == 0) s.measures[half][threadIdx.x / 32] = m;
  __syncthreads();
  return warp_measure(s.measures[half][threadIdx.x % 32]);
}

}  // namespace vkvx
