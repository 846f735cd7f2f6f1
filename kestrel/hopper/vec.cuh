// Vectors of adjacent elements, moved by one instruction.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kestrel {

template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Vec {
  T at[kSize];
};

template <class T>
inline constexpr int kVec16 = 16 / sizeof(T);  // elements in 16 bytes

// An ordinary load: what a predecessor wrote is visible after wait_for_predecessor().
template <class V, class T>
__device__ __forceinline__ V load(const T* p) {
  return *reinterpret_cast<const V*>(p);
}
template <class V, class T>
__device__ __forceinline__ void store(T* p, const V& v) {
  *reinterpret_cast<V*>(p) = v;
}

inline bool aligned_to(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace kestrel
