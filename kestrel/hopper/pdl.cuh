// Programmatic dependent launch, the library's rule: before its wait a kernel reads only what no kernel writes during
// the run (weights, scales, tables) and writes nothing; it triggers right after its wait, so that when its successor
// starts, everything older than this kernel is complete. Products of weights and norms of few rows trigger at once: the
// weights of the next product are then on their way two kernels early. No-ops below sm_90 and in plain launches.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kestrel/hopper/delay.cuh"

namespace kestrel {

// griddepcontrol.wait: returns when the preceding grid has completed and its writes are visible.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  come_late();
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Has `value` computed here, not where it is used: a load stays ahead of the branch that follows. (ptxas still moves
// address arithmetic past a wait.)
template <class T>
__device__ __forceinline__ void compute_now(T& value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else if constexpr (std::is_same_v<T, float>) {
    asm volatile("" : "+f"(value));
  } else {
    static_assert(sizeof(T) == 4);
    asm volatile("" : "+r"(value));
  }
}

// The same for a pointer into global memory, which the compiler still knows it to be afterwards.
template <class T>
__device__ __forceinline__ void compute_now(T*& pointer) {
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
}

// griddepcontrol.launch_dependents: the following grid may be placed. It publishes nothing.
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
  come_late();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// prefetch.global.L2, of one line: a hint, so that it may come before the wait for a predecessor that is still writing
// there. Unlike a load it keeps no load of another block on the SM waiting.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// What a block is about to read may be asked for before the wait, each line by the one thread whose data begin it. It
// pays in small grids, whose blocks start while the predecessor's still run: gelu_residual 64x1024 takes 1.00 us
// instead of 1.23, rmsnorm_residual 1x2048 0.99 instead of 1.26. In large ones the loads come right behind, and both
// are slower: moe_sum 740x8x2048 8.8 us instead of 7.6.
__device__ __forceinline__ bool starts_early() { return gridDim.x * gridDim.y <= 768; }
__device__ __forceinline__ void prefetch_line(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 128 == 0) prefetch(p);
}

// Wait and trigger, for a norm. Of few rows it triggers first: a token through SmolLM2-135M takes 440 us instead of
// 509. Blocks of many would be in each other's way (layernorm 729x1152: 2.66 us instead of 2.22).
__device__ __forceinline__ void wait_and_release(int64_t rows) {
  if (rows <= 16) release_successor();
  wait_for_predecessor();
  release_successor();
}

}  // namespace kestrel
