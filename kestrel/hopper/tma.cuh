// Copies from global to shared memory that run beside the thread that issues them. The bulk ones count their bytes on
// an mbarrier; shared addresses are those of the shared window, at multiples of 16 (boxes with a 128-byte swizzle:
// 1024).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kestrel/hopper/vec.cuh"

namespace kestrel {

// cp.async.bulk: contiguous bytes, a multiple of 16.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// cp.async.bulk.tensor.4d: the box of `map` (tensor_map.h) at these coordinates, innermost first. What lies outside the
// tensor comes as zero and counts like the rest.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int c0, int c1, int c2, int c3,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}

// cp.async.bulk.tensor.5d
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int c0, int c1, int c2, int c3, int c4,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
      "%6}], [%7];" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier)
      : "memory");
}

// prefetch.tensormap: of a map among the kernel's arguments, for a first box that comes later.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// How the second-level cache keeps what a copy reads.
constexpr uint64_t kKeepAsUsual = uint64_t{0x10f0} << 48, kEvictFirst = uint64_t{0x12f0} << 48;
constexpr uint64_t kEvictLast = uint64_t{0x14f0} << 48;

__device__ __forceinline__ void copy_box_kept(uint32_t to, const CUtensorMap* map, int c0, int c1, int c2, int c3,
                                              uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier), "l"(policy)
      : "memory");
}

// .multicast::cluster: to that address, and counted on that barrier, in each block of the cluster whose bit is set.
__device__ __forceinline__ void copy_box_to(uint16_t ranks, uint32_t to, const CUtensorMap* map, int c0, int c1, int c2,
                                            int c3, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7, %8;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier), "h"(ranks), "l"(policy)
      : "memory");
}

// cp.async.bulk.prefetch.tensor: the box to L2 alone.
__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(c0), "r"(c1),
               "r"(c2), "r"(c3)
               : "memory");
}

// cp.async, 16 bytes (or 4 or 8, which go through L1): of those `valid` (all or 0) are read, the others come as zero.
template <int kBytes = 16>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, uint32_t valid = kBytes) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(valid), "n"(kBytes)
                 : "memory");
  }
}

// cp.async.mbarrier.arrive.noinc: one of the barrier's arrivals, once this thread's copy_async so far have landed.
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// cp.async.wait_all: this thread's copy_async have landed; a barrier shows them to others.
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// cp.async.commit_group, cp.async.wait_group: this thread's copy_async since the last commit are a group; until at most
// kPending groups are under way.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ld.global.v4 of what nobody reads again: it leaves L2 before others do.
template <int kSize, class T>
__device__ __forceinline__ Vec<T, kSize> load_last(const T* from) {
  static_assert(Vec<T, kSize>::kBytes == 16);
  Vec<T, kSize> v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(from), "l"(kEvictFirst)
               : "memory");
  return v;
}

// st.global.v4 with a policy for L2
__device__ __forceinline__ void store_global(void* to, uint4 v, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w), "l"(policy)
               : "memory");
}

}  // namespace kestrel
