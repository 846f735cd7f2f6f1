// Quantization to e4m3 by the largest magnitude: scale = max(absmax / 448, 1e-6), bits = e4m3(x / scale).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/warp.cuh"

namespace kestrel {

constexpr float kSmallestScale = 1e-6f;

__device__ __forceinline__ uint32_t warp_max(uint32_t value) { return __reduce_max_sync(~0u, value); }

__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  return over_block(value, 0u, [](uint32_t v) { return warp_max(v); });
}

// The larger of each half; of a number and NaN the number.
template <class T>
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<dtype_of<T> == DType::kBF16, __nv_bfloat162, __half2>;
  const Pair result = __hmax2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}

// The largest magnitude, less NaN, as the bits of its type, which are ordered like the values.
template <class T, int kVec, int kVectors>
__device__ __forceinline__ uint32_t absmax(const Vec<T, kVec> (&x)[kVectors]) {
  uint32_t partial[4] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int w = 0; w < Vec<T, kVec>::kWords; ++w) {
      if constexpr (sizeof(T) == 4) {
        const uint32_t magnitude = x[v].words[w] & 0x7fffffff;
        partial[w] = max(partial[w], magnitude > 0x7f800000 ? 0 : magnitude);
      } else {
        partial[w] = larger<T>(partial[w], x[v].words[w] & 0x7fff7fff);
      }
    }
  if constexpr (sizeof(T) == 4) return max(max(partial[0], partial[1]), max(partial[2], partial[3]));
  const uint32_t all = larger<T>(larger<T>(partial[0], partial[1]), larger<T>(partial[2], partial[3]));
  return max(all & 0xffff, all >> 16);
}

// max(a / 448, 1e-6), the quotient rounded once. Of 16 bits 1/448 in two parts gives the bits of the division for every
// value whose quotient is above 1e-6 (tried for all of them), in two instructions and without a branch; Inf stays Inf.
template <class T>
__device__ __forceinline__ float scale_of(uint32_t magnitude) {
  if constexpr (sizeof(T) == 4) {
    return fmaxf(__fdiv_rn(__uint_as_float(magnitude), 448.0f), kSmallestScale);
  } else {
    constexpr float kHigh = 0x1.249248p-9f, kLow = 0x1.24924ap-33f;
    const float a = to_float(T{static_cast<uint16_t>(magnitude)});
    return fmaxf(__fmaf_rn(a, kHigh, __fmul_rn(a, kLow)), kSmallestScale);
  }
}

// 1 / scale, rounded once, for a scale as scale_of() gives it: one step of Newton, as the division by ptxas has it, but
// for Inf without its branch. (No such scale or reciprocal is subnormal, and none is NaN.)
__device__ __forceinline__ float reciprocal_of(float scale) {
  const float r = fast_reciprocal(scale);
  return scale == INFINITY ? 0.0f : __fmaf_rn(r, __fmaf_rn(-scale, r, 1.0f), r);
}

}  // namespace kestrel
