// The rotation, for all kernels that rotate: every operation is written out, so that all of them give the same bits.
// Vectors come in pieces: two of one head, which hold kVec pairs and take kVec cosines and kVec sines from column
// kVec * piece on.
//   halves (GPT-NeoX)   elements from kVec * piece on and as many from R/2 + kVec * piece on
//   neighbours (GPT-J)  2 * kVec elements from 2 * kVec * piece on
#pragma once

#include "kestrel/hopper/vec.cuh"

namespace kestrel {

__device__ __forceinline__ void rotate_pair(float& a, float& b, float cosine, float sine) {
  const float x = a, y = b;
  a = __fmaf_rn(x, cosine, -__fmul_rn(y, sine));
  b = __fmaf_rn(y, cosine, __fmul_rn(x, sine));
}

template <int kSize>
__device__ __forceinline__ void load_floats(const float* p, float (&out)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const auto v = load<4>(p + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[i + j] = __uint_as_float(v.words[j]);
  }
}

template <bool kNeighbours, class T, int kVec>
__device__ __forceinline__ void rotate_piece(Vec<T, kVec>& first, Vec<T, kVec>& second, const float (&cosines)[kVec],
                                             const float (&sines)[kVec]) {
  float a[kVec], b[kVec];
  to_floats(first, a);
  to_floats(second, b);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if constexpr (kNeighbours) {
      float* x = i < kVec / 2 ? a : b;
      const int left = 2 * i % kVec;
      rotate_pair(x[left], x[left + 1], cosines[i], sines[i]);
    } else {
      rotate_pair(a[i], b[i], cosines[i], sines[i]);
    }
  }
  first = from_floats<T>(a);
  second = from_floats<T>(b);
}

}  // namespace kestrel
