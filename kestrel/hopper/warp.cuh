// What the threads of a warp, and the warps of a block, tell one another.
#pragma once

#include <cstdint>

namespace kestrel {

constexpr int kWarp = 32;

// elect.sync: true in one lane of a whole warp, without a register for its number.
__device__ __forceinline__ bool elected() {
  uint32_t is;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(is));
  return is;
}

__device__ __forceinline__ float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(~0u, value, lanes); }

// The same value in every lane, which the compiler then knows: it keeps it, and what follows from it, in the registers
// of the warp, where descriptors and loop counters cost the threads nothing.
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(~0u, value, 0); }

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

// Of the lanes up to this one.
template <class T>
__device__ __forceinline__ T sum_up_to_lane(T value) {
#pragma unroll
  for (uint32_t lanes = 1; lanes < kWarp; lanes *= 2) {
    const T below = __shfl_up_sync(~0u, value, lanes);
    if (threadIdx.x % kWarp >= lanes) value += below;
  }
  return value;
}

// From of_warp(value), over a warp and in each lane, the same over all threads of a block of whole warps, in a fixed
// order. `none` changes no result.
template <class T, class OfWarp>
__device__ __forceinline__ T over_block(T value, T none, const OfWarp& of_warp) {
  __shared__ T of_warps[kWarp];
  value = of_warp(value);
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarp;
  return of_warp(lane < blockDim.x / kWarp ? of_warps[lane] : none);
}

__device__ __forceinline__ float block_sum(float value) {
  return over_block(value, 0.0f, [](float v) { return warp_sum(v); });
}

}  // namespace kestrel
