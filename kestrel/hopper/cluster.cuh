// Clusters: blocks of one launch that run at once on neighbouring SMs and reach each other's shared memory.
#pragma once

#include <cstdint>

namespace kestrel {

// barrier.cluster, by all threads: what they did before is seen by all blocks after. None ends before its peers come.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// mapa, mbarrier.arrive: at the barrier that lies at the same address in the block of that rank. It orders what the
// thread has read, not what it has written: a release for the whole cluster waits for memory, 1.2 us each time.
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

}  // namespace kestrel
