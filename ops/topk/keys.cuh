// A score and its place as one integer: the better score is the larger, among equals that of the lower index, so that
// no two are equal. 32 bits hold both for scores of 16 bits and indices below 65536, else 64 do. 0 is below them all.
#pragma once

#include <type_traits>

#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/warp.cuh"

namespace kestrel {

// The bits of a vector's score; those of 16 in the upper half.
template <class T, int kVec>
__device__ __forceinline__ uint32_t bits_at(const Vec<T, kVec>& v, int i) {
  if constexpr (sizeof(T) == 4)
    return v.words[i];
  else if constexpr (kVec == 1)
    return uint32_t{v.words[0]} << 16;
  else
    return i % 2 == 0 ? v.words[i / 2] << 16 : v.words[i / 2] & 0xffff0000;
}

// The order of scores: -0.0 like 0.0, NaN above all.
template <class T>
__device__ __forceinline__ uint32_t rank_of_bits(uint32_t bits) {
  constexpr uint32_t kInfinity = dtype_of<T> == DType::kF16 ? 0x7c000000 : 0x7f800000;
  constexpr uint32_t kNaN = dtype_of<T> == DType::kF32 ? 0xffffffff : 0xffff0000;
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t sign = static_cast<int32_t>(bits) >> 31;
  return magnitude > kInfinity ? kNaN : ((magnitude ^ sign) - sign) + 0x80000000;
}
// The score; any NaN comes back as one, -0.0 as 0.0.
template <class T>
__device__ __forceinline__ float score_of_rank(uint32_t rank) {
  const uint32_t bits = rank < 0x80000000 ? (0x80000000 - rank) | 0x80000000 : rank - 0x80000000;
  if constexpr (dtype_of<T> == DType::kF32)
    return __uint_as_float(bits);
  else
    return to_float(T{static_cast<uint16_t>(bits >> 16)});
}

template <class Key, class T>
__device__ __forceinline__ Key key_of_bits(uint32_t bits, uint32_t index) {
  const uint32_t rank = rank_of_bits<T>(bits);
  if constexpr (sizeof(Key) == 4)
    return rank + (0xffff - index);
  else
    return Key{rank} << 32 | ~index;
}
template <class Key>
__device__ __forceinline__ uint32_t rank_of(Key key) {
  if constexpr (sizeof(Key) == 4)
    return key & 0xffff0000;
  else
    return static_cast<uint32_t>(key >> 32);
}
template <class Key>
__device__ __forceinline__ uint32_t index_of(Key key) {
  if constexpr (sizeof(Key) == 4)
    return 0xffff - (key & 0xffff);
  else
    return ~static_cast<uint32_t>(key);
}

template <class Key>
__device__ __forceinline__ Key larger(Key a, Key b) {
  return a > b ? a : b;
}

__device__ __forceinline__ uint32_t warp_best(uint32_t key) { return __reduce_max_sync(~0u, key); }
__device__ __forceinline__ uint64_t warp_best(uint64_t key) {
  const uint32_t high = static_cast<uint32_t>(key >> 32), best = __reduce_max_sync(~0u, high);
  return uint64_t{best} << 32 | __reduce_max_sync(~0u, high == best ? static_cast<uint32_t>(key) : 0);
}

// Keys of a lane, largest first (Batcher's bitonic network, 1968).
template <class Key, int kCount>
__device__ __forceinline__ void sort_descending(Key (&keys)[kCount]) {
#pragma unroll
  for (int run = 2; run <= kCount; run *= 2)
#pragma unroll
    for (int step = run / 2; step > 0; step /= 2)
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int j = i ^ step;
        if (j < i) continue;
        const bool ordered = keys[i] > keys[j];
        const Key high = ordered ? keys[i] : keys[j], low = ordered ? keys[j] : keys[i];
        const bool descending = (i & run) == 0;
        keys[i] = descending ? high : low;
        keys[j] = descending ? low : high;
      }
}

// The best of a warp's keys, taken out: each lane holds some, largest first.
template <class Key, int kCount>
__device__ __forceinline__ Key take_best(Key (&keys)[kCount]) {
  const Key best = warp_best(keys[0]);
  const bool mine = keys[0] == best;
#pragma unroll
  for (int i = 0; i + 1 < kCount; ++i) keys[i] = mine ? keys[i + 1] : keys[i];
  keys[kCount - 1] = mine ? 0 : keys[kCount - 1];
  return best;
}

}  // namespace kestrel
