// Thread block clusters: their barrier, and stores into another block's shared memory. No-ops below sm_90, where no
// cluster is ever launched.
#pragma once

#include <cstdint>

#include "kestrel/hopper/delay.cuh"

namespace kestrel {

// %cluster_ctarank, %clusterid.x
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ uint32_t cluster_index() {
  uint32_t index = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
#endif
  return index;
}

// barrier.cluster.arrive.relaxed, .wait: between them, all blocks have begun.
__device__ __forceinline__ void cluster_begun_arrive() {
#if __CUDA_ARCH__ >= 900
  come_late();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_begun_wait() {
#if __CUDA_ARCH__ >= 900
  come_late();
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// barrier.cluster.arrive.release, .wait.acquire: what the blocks stored before is seen by all after.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  come_late();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// mapa: where the shared address of this block lies in the block of that rank.
__device__ __forceinline__ uint32_t address_in(uint32_t address, uint32_t rank) {
  uint32_t mapped = address;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
#endif
  return mapped;
}

// mbarrier.arrive, at a barrier of any block of the cluster (address_in). It orders what the thread has read; of what
// it has written, only what its own block sees.
__device__ __forceinline__ void arrive_in_cluster(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  come_late();
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// st.shared::cluster
__device__ __forceinline__ void store_in_cluster(uint32_t address, uint32_t value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
#endif
}
__device__ __forceinline__ void store_in_cluster(uint32_t address, float4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x), "f"(value.y),
               "f"(value.z), "f"(value.w)
               : "memory");
#endif
}
__device__ __forceinline__ void store_in_cluster(uint32_t address, float2 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(value.x), "f"(value.y) : "memory");
#endif
}

}  // namespace kestrel
