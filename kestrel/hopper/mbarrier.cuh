// Barriers in shared memory that count arrivals and the bytes of bulk copies. Addresses are those of the shared window.
// A phase ends when all arrivals have come and all expected bytes have landed; a fresh barrier is in phase 0, and
// waiting for the phase before that (parity 1) returns at once.
#pragma once

#include <cstdint>

#include "kestrel/hopper/delay.cuh"

namespace kestrel {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// mbarrier.init
__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init, fence.proxy.async: bulk copies see barriers that this thread has made.
__device__ __forceinline__ void fence_init_barrier() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// fence.proxy.async: what this thread has written to shared memory is seen by wgmma and bulk copies that come after a
// barrier.
__device__ __forceinline__ void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// mbarrier.arrive: what this thread has read and written before comes before the end of the phase.
__device__ __forceinline__ void arrive(uint32_t barrier) {
  come_late();
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.arrive.expect_tx
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  come_late();
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// mbarrier.try_wait.parity, until the phase of that parity has ended.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  come_late();
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
}

// mbarrier.test_wait.parity: whether that phase has ended.
__device__ __forceinline__ bool test_barrier(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended != 0;
}

// bar.sync over the first `threads` threads that come to it: whole warps, id 1 to 15 (__syncthreads is 0).
__device__ __forceinline__ void sync_threads(int id, uint32_t threads) {
  come_late();
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// bar.arrive: counts as one of those that sync_threads(id, threads) waits for, without waiting.
__device__ __forceinline__ void arrive_threads(int id, uint32_t threads) {
  come_late();
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace kestrel
