// The largest magnitude of a row, as the bits of its type, which are ordered like the values.
#pragma once

#include <cstdint>

#include "kestrel/hopper/warp.cuh"

namespace kestrel {

constexpr float kSmallestScale = 1e-6f;

__device__ __forceinline__ uint32_t warp_max(uint32_t value) { return __reduce_max_sync(~0u, value); }

__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  return over_block(value, 0u, [](uint32_t v) { return warp_max(v); });
}

}  // namespace kestrel
