// Clusters of blocks, and barriers that count bytes. Compute capability 9.0;
// kernels that use them are not launched below it as clusters.
#pragma once

#include "common.cuh"

namespace vkvx {

// The threads of a cluster have started: the others may write to this block's
// shared memory once they waited.
__device__ __forceinline__ void start_in_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

// All threads of a cluster arrive, then wait for each other; what they wrote to
// shared memory before they arrived, the others see after they waited.
__device__ __forceinline__ void arrive_at_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_at_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// A barrier in shared memory that is passed when so many bytes have been sent
// to this block. Others may send once the cluster has started after this.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t at = shared_address(barrier);
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void wait_for_bytes(uint64_t* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier))
        : "memory");
  } while (!done);
#endif
}

// Two numbers to where another block of the cluster has what lies at `here`, a
// multiple of 8 bytes, in this one's shared memory; they count at its barrier.
__device__ __forceinline__ void send_to_block(float* here, float x, float y, uint64_t* barrier,
                                              int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .u32 to, at;\n"
      "mapa.shared::cluster.u32 to, %0, %4;\n"
      "mapa.shared::cluster.u32 at, %3, %4;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2."
      "f32 [to], {%1, %2}, "
      "[at];\n}" ::"r"(shared_address(here)),
      "f"(x), "f"(y), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
#endif
}

// Where another block of the cluster has what lies at `here` in this one's
// shared memory.
__device__ __forceinline__ float* shared_of_block(float* here, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  float* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(rank));
  return there;
#else
  return here;
#endif
}

}  // namespace vkvx
