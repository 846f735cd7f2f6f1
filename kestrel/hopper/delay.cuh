// With KESTREL_DELAYS, a build for tests, one warp in eight comes up to 4 us late to a barrier, to the wait for the
// kernel before or to the release of the next: an order that only happened to hold breaks. A lane that arrives alone
// sleeps alone, and the others of its warp do not wait for it until something brings them together. Otherwise nothing.
#pragma once

#include <cstdint>

namespace kestrel {

__device__ __forceinline__ void come_late() {
#ifdef KESTREL_DELAYS
  const uint32_t dice = (static_cast<uint32_t>(clock()) + blockIdx.x * 977 + threadIdx.x / 32 * 131) * 2654435761u;
  if (dice >> 29 == 0) __nanosleep(dice >> 17 & 0xfff);
#endif
}

}  // namespace kestrel
