// The rotation, for all kernels that rotate: every operation is written out, so that all of them give the same bits.
// Lanes hold the vectors of a head in their order; R is the rotated width, R/2 the cosines of a row of the table.
//   halves (GPT-NeoX)   vector v turns with vector v + R/2 / kVec, another lane's
//   neighbours (GPT-J)  a vector holds its pairs whole
#pragma once

#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/warp.cuh"

namespace kestrel {

__device__ __forceinline__ void rotate_pair(float& a, float& b, float cosine, float sine) {
  const float x = a, y = b;
  a = __fmaf_rn(x, cosine, -__fmul_rn(y, sine));
  b = __fmaf_rn(y, cosine, __fmul_rn(x, sine));
}

template <int kSize>
__device__ __forceinline__ void load_floats(const float* p, float (&out)[kSize]) {
  constexpr int kPart = kSize < 4 ? kSize : 4;
#pragma unroll
  for (int i = 0; i < kSize; i += kPart) {
    const auto v = load<kPart>(p + i);
#pragma unroll
    for (int j = 0; j < kPart; ++j) out[i + j] = __uint_as_float(v.words[j]);
  }
}

template <class T, bool kNeighbours>
class Rotation {
  static constexpr int kVec = kVec16<T>, kPairs = kNeighbours ? kVec / 2 : kVec;

 public:
  // The columns of the table from which this lane takes cosines, and R/2 further sines; valid for any vector.
  const uint32_t column;

  __device__ __forceinline__ Rotation(uint32_t vector, uint32_t half)
      : column(kNeighbours ? (2 * half > vector * kVec ? vector * kPairs : 0)
                           : (vector * kVec < half       ? vector * kVec
                              : vector * kVec < 2 * half ? vector * kVec - half
                                                         : 0)),
        signs_(vector * kVec >= half ? 0
               : sizeof(T) == 4      ? 0x80000000
                                     : 0x80008000),
        partner_(threadIdx.x % kWarp + (vector * kVec < half ? half / kVec : 0 - half / kVec)) {}

  // row: from `column` on
  __device__ __forceinline__ void load_row(const float* row, uint32_t half) {
    load_floats(row, cosines_);
    load_floats(row + half, sines_);
  }
  // For all lanes of the warp together.
  template <int kSize>
  __device__ __forceinline__ Vec<T, kSize> turned(const Vec<T, kSize>& v) const {
    static_assert(kSize == kVec);
    float x[kVec];
    to_floats(v, x);
    if constexpr (kNeighbours) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) rotate_pair(x[2 * i], x[2 * i + 1], cosines_[i], sines_[i]);
    } else {
      Vec<T, kVec> other;
#pragma unroll
      for (int w = 0; w < v.kWords; ++w) other.words[w] = __shfl_sync(~0u, v.words[w], partner_) ^ signs_;
      float y[kVec];
      to_floats(other, y);
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] = __fmaf_rn(x[i], cosines_[i], __fmul_rn(y[i], sines_[i]));
    }
    return from_floats<T>(x);
  }

 private:
  uint32_t signs_;    // of a word: the first half takes its partner's negated, x cos + (-y) sin
  uint32_t partner_;  // lane
  float cosines_[kPairs], sines_[kPairs];
};

}  // namespace kestrel
