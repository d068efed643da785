// What the kernels share: conversions, reductions over a warp, and the instructions that CUDA C++
// has no name for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../operator_table.h"

// Instructions of compute capability 8.0; kernels that use them have no body below it, and are not
// launched there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define VKVX_HAS_TENSOR_CORES 1
#define VKVX_ASM(...) asm(__VA_ARGS__)
#define VKVX_ASM_VOLATILE(...) asm volatile(__VA_ARGS__)
#else
#define VKVX_HAS_TENSOR_CORES 0
#define VKVX_ASM(...)
#define VKVX_ASM_VOLATILE(...)
#endif

namespace vkvx {

constexpr int kMaxDecodePositions = 8;  // longest call that the decode kernels take
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kHalfMax = 65504.0f;
constexpr unsigned kFull = 0xffffffffu;

// Element i of an array of the model's float type, as FP32.
__device__ __forceinline__ float load_float(const void* data, int64_t i, int dtype) {
  if (dtype == VKVX_FLOAT16) return __half2float(static_cast<const __half*>(data)[i]);
  if (dtype == VKVX_BFLOAT16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

// A mean of rounded levels can lie a little beyond the largest FP16 number; NaN stays.
__device__ __forceinline__ float within_half(float x) {
  return x > kHalfMax ? kHalfMax : x < -kHalfMax ? -kHalfMax : x;
}

__device__ __forceinline__ void store_float(void* data, int64_t i, int dtype, float x) {
  if (dtype == VKVX_FLOAT16)
    static_cast<__half*>(data)[i] = __float2half_rn(within_half(x));
  else if (dtype == VKVX_BFLOAT16)
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
  else
    static_cast<float*>(data)[i] = x;
}

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  __half2 h = __floats2half2_rn(low, high);
  return reinterpret_cast<uint32_t&>(h);
}

__device__ __forceinline__ uint32_t pack_bfloat2(float low, float high) {
  __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<uint32_t&>(h);
}

// Four adjacent elements of a 16-bit type, the first a multiple of 4.
__device__ __forceinline__ void store_four(void* data, int64_t i, int dtype, float4 x) {
  uint2 packed;
  if (dtype == VKVX_FLOAT16) {
    packed = make_uint2(pack_half2(within_half(x.x), within_half(x.y)),
                        pack_half2(within_half(x.z), within_half(x.w)));
  } else {
    packed = make_uint2(pack_bfloat2(x.x, x.y), pack_bfloat2(x.z, x.w));
  }
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + i) = packed;
}

__host__ __device__ __forceinline__ int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(kFull, x, o);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(kFull, x, o));
  return x;
}

// A condition that is the same in all lanes, so that the compiler knows it too.
__device__ __forceinline__ bool uniform(bool x) { return __any_sync(kFull, x); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// What correction `expected` adds to the scores of a group, in natural units: t / (1 + t / limit).
__device__ __forceinline__ float expected_correction(float t, float limit) {
  return t / (1.0f + t / limit);
}

// A score, in units of log2 or natural ones as the bound is, bounded by tanh; -inf stays.
__device__ __forceinline__ float bounded_score(float score, float bound) {
  const float x =
      bound - __fdividef(2.0f * bound, exp2_fast(score * (2.0f * kLog2e / bound)) + 1.0f);
  return score == -INFINITY ? score : x;
}

// What a position of a call sees: cached visual entries and text rows from these on, and tokens of
// its call from `first` to `last`.
struct Sight {
  int visual, text, first, last;
};

// Whether some position sees less than all that is cached, or not its call's tokens up to itself.
__host__ __device__ __forceinline__ bool is_masked(const VkvxParams& p) {
  return p.sliding_window || (p.visual_mask != VKVX_MASK_CAUSAL && p.positions > 1);
}

// Whether scores are neither masked in another way than causally nor bounded.
__host__ __device__ __forceinline__ bool is_plain(const VkvxParams& p) {
  return !is_masked(p) && p.softcap == 0.0f;
}

// Of position s of row b; `run_end` is the last position that it sees with the mask `run`.
__device__ __forceinline__ Sight sight_of(const VkvxParams& p, int b, int s, int run_end) {
  Sight seen{0, 0, 0, s};
  if (p.sliding_window) {
    const int* start = p.window_start + static_cast<int64_t>(b) * 2 * p.positions + s;
    seen.visual = start[0], seen.text = start[p.positions];
    if (p.visual_mask != VKVX_MASK_PREFIX) seen.first = max(0, s - p.sliding_window + 1);
  }
  if (p.visual_mask == VKVX_MASK_RUN) seen.last = run_end;
  if (p.visual_mask == VKVX_MASK_PREFIX) seen.last = p.positions - 1;
  return seen;
}

// The code of one element, whose planes are `plane` words apart: bit `bit` of each.
__device__ __forceinline__ int gather_code(const int* words, int64_t plane, int bits, int bit) {
  int code = 0;
  for (int p = 0; p < bits; ++p) code |= (words[p * plane] >> bit & 1) << p;
  return code;
}

// The positions in one row of an index, one bit each, for calls of at most 32 positions; a warp
// works together.
__device__ __forceinline__ unsigned collect_positions(const int* index, int entries, int b) {
  unsigned mine = 0;
#pragma unroll 1
  for (int i = threadIdx.x & 31; i < entries; i += 32) {
    const int at = index[static_cast<int64_t>(b) * entries + i];
    if (at >= 0) mine |= 1u << at;
  }
#if VKVX_HAS_TENSOR_CORES
  return __reduce_or_sync(kFull, mine);
#else
  return mine;
#endif
}

// Wait for the kernels before this one on its stream; launched as a dependent it may start before
// they end.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may start as soon as a multiprocessor can hold them; they wait as above.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ int reduce_max(int x) {
#if VKVX_HAS_TENSOR_CORES
  return __reduce_max_sync(kFull, x);
#else
  return x;
#endif
}

// D += A B with fp16 or bf16 A [16, 16] and B [16, 8], FP32 D. A subnormal fp16 counts as what it
// is.
__device__ __forceinline__ void mma_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  VKVX_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};" : "+f"(d[0]),
      "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bfloat(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                           uint32_t a3, uint32_t b0, uint32_t b1) {
  VKVX_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};" : "+f"(d[0]),
      "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// D = popc(A & B), bits: A [16, 128], B [128, 8].
__device__ __forceinline__ void mma_bits(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const int zero = 0;
  VKVX_ASM(
      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%7,%7,%7,%7};" : "=r"(d[0]),
      "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(a0), "r"(a1), "r"(b), "r"(zero));
}

#define VKVX_MMA_BYTES(types)                                                                \
  VKVX_ASM("mma.sync.aligned.m16n8k32.row.col.s32." types                                    \
           ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" : "=r"(d[0]),    \
           "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), \
           "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]))

// D = A B + C in integers: A [16, 32], B [32, 8] of u8, or s8 where they are signed.
template <bool kSignedA, bool kSignedB>
__device__ __forceinline__ void mma_bytes(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                          uint32_t a3, uint32_t b0, uint32_t b1,
                                          const int (&c)[4]) {
  static_assert(!(kSignedA && kSignedB));
  if constexpr (kSignedA)
    VKVX_MMA_BYTES("s8.u8");
  else if constexpr (kSignedB)
    VKVX_MMA_BYTES("u8.s8");
  else
    VKVX_MMA_BYTES("u8.u8");
}
#undef VKVX_MMA_BYTES

template <bool kSignedA, bool kSignedB>
__device__ __forceinline__ void mma_bytes(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                          uint32_t a3, uint32_t b0, uint32_t b1) {
  mma_bytes<kSignedA, kSignedB>(d, a0, a1, a2, a3, b0, b1, d);
}

// Four 8x8 matrices of 16-bit elements (or 8 rows of 4 words): lane 8m + r gives the address of row
// r of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  VKVX_ASM_VOLATILE("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]),
                    "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  VKVX_ASM_VOLATILE(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]),
      "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ void store_word(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// Transpose of an 8x8 matrix of 16-bit elements spread over the warp.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  VKVX_ASM("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// 16 bytes to shared memory, asynchronously; `valid` false writes zeros and reads nothing.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid = true) {
  VKVX_ASM_VOLATILE("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                    "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_commit() {
  VKVX_ASM_VOLATILE("cp.async.commit_group;" :: : "memory");
}

template <int kPending>
__device__ __forceinline__ void copy_wait() {
  VKVX_ASM_VOLATILE("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace vkvx
