// The largest magnitude of a row, as the bits of its type, which are ordered like the values.
#pragma once

#include <cstdint>

#include "kestrel/hopper/warp.cuh"

namespace kestrel {

constexpr float kSmallestScale = 1e-6f;

__device__ __forceinline__ uint32_t warp_max(uint32_t value) { return __reduce_max_sync(~0u, value); }

// Over a block of whole warps, in every thread.
__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t warps[kWarp];
  value = warp_max(value);
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return warp_max(lane < blockDim.x / kWarp ? warps[lane] : 0);
}

}  // namespace kestrel
