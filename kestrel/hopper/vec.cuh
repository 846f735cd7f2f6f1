// Vectors of adjacent elements: moved by one instruction, kept in registers as packed 32-bit words (an array of 16-bit
// elements would take a register each), converted to and from float two at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include <kestrel/tensor.h>

#include "kestrel/arithmetic.h"
#include "kestrel/hopper/numeric.cuh"

namespace kestrel {

template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Vec {
  static constexpr int kBytes = kSize * sizeof(T);
  using Word = std::conditional_t<kBytes % 4 == 0, uint32_t, std::conditional_t<kBytes % 2 == 0, uint16_t, uint8_t>>;
  static constexpr int kWords = kBytes / sizeof(Word);
  Word words[kWords];
};

template <class T>
inline constexpr int kVec16 = 16 / sizeof(T);  // elements in 16 bytes

// An ordinary load: what a predecessor wrote is visible after wait_for_predecessor().
template <int kSize, class T>
__device__ __forceinline__ Vec<T, kSize> load(const T* p) {
  return *reinterpret_cast<const Vec<T, kSize>*>(p);
}
template <class T, int kSize>
__device__ __forceinline__ void store(T* p, const Vec<T, kSize>& v) {
  *reinterpret_cast<Vec<T, kSize>*>(p) = v;
}

template <class T, int kSize>
__device__ __forceinline__ void to_floats(const Vec<T, kSize>& v, float (&out)[kSize]) {
#pragma unroll
  for (int w = 0; w < Vec<T, kSize>::kWords; ++w) {
    if constexpr (sizeof(T) == 4) {
      out[w] = __uint_as_float(v.words[w]);
    } else if constexpr (kSize == 1) {
      out[w] = to_float(T{v.words[w]});
    } else if constexpr (sizeof(T) == 1 && sizeof(v.words[w]) == 4) {
      const float2 low = to_float2<T>(v.words[w]), high = to_float2<T>(v.words[w] >> 16);
      out[4 * w] = low.x;
      out[4 * w + 1] = low.y;
      out[4 * w + 2] = high.x;
      out[4 * w + 3] = high.y;
    } else {
      const float2 pair = to_float2<T>(v.words[w]);
      out[2 * w] = pair.x;
      out[2 * w + 1] = pair.y;
    }
  }
}

template <class T, int kSize>
__device__ __forceinline__ Vec<T, kSize> from_floats(const float (&in)[kSize]) {
  Vec<T, kSize> v;
#pragma unroll
  for (int w = 0; w < Vec<T, kSize>::kWords; ++w) {
    if constexpr (sizeof(T) == 4) {
      v.words[w] = __float_as_uint(in[w]);
    } else if constexpr (kSize == 1) {
      v.words[w] = from_float<T>(in[w]).bits;
    } else if constexpr (sizeof(T) == 2) {
      v.words[w] = from_float2<T>(in[2 * w], in[2 * w + 1]);
    } else {
      v.words[w] = from_float2<T>(in[4 * w], in[4 * w + 1]) | uint32_t{from_float2<T>(in[4 * w + 2], in[4 * w + 3])}
                                                                  << 16;
    }
  }
  return v;
}

// Each element times `factor`, one rounding in fp32 and one to `To`: the same bits wherever values are scaled.
template <class To, class T, int kSize>
__device__ __forceinline__ Vec<To, kSize> scaled(const Vec<T, kSize>& v, float factor) {
  float f[kSize];
  to_floats(v, f);
#pragma unroll
  for (int i = 0; i < kSize; ++i) f[i] = __fmul_rn(f[i], factor);
  return from_floats<To>(f);
}

// As in pdl.cuh, for a whole vector.
template <class T, int kSize>
__device__ __forceinline__ void compute_now(Vec<T, kSize>& v) {
#pragma unroll
  for (auto& word : v.words) asm volatile("" : "+r"(word));
}

// Does every row begin at a multiple of the vector's size?
template <class T, int kSize>
bool vectors_fit(const Tensor& t, const Rows& rows) {
  return aligned_to(t.data, kSize * sizeof(T)) && rows.inner_stride % kSize == 0 && rows.outer_stride % kSize == 0;
}

}  // namespace kestrel
