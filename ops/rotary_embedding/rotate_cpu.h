// The rotation of one head, for all CPU twins that rotate. Products and sums are rounded separately: the same bits at
// every instruction set level. Not inlined: all of them run this very code, so that NaN payloads agree too.
#pragma once

#include "kestrel/cpu/convert.h"

namespace KESTREL_CPU {

// out is x or lies apart from it: iterations are independent in both, __restrict would be wrong in one.
template <class T>
[[gnu::noinline]] void rotate_halves(T* out, const T* x, const float* __restrict cosines, const float* __restrict sines,
                                     int64_t pairs) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = to_float(x[i]), b = to_float(x[pairs + i]);
    out[i] = from_float<T>(a * cosines[i] - b * sines[i]);
    out[pairs + i] = from_float<T>(b * cosines[i] + a * sines[i]);
  }
}

template <class T>
[[gnu::noinline]] void rotate_neighbours(T* out, const T* x, const float* __restrict cosines,
                                         const float* __restrict sines, int64_t pairs) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
    out[2 * i] = from_float<T>(a * cosines[i] - b * sines[i]);
    out[2 * i + 1] = from_float<T>(b * cosines[i] + a * sines[i]);
  }
}

// The first 2 * pairs elements. cos_sin: a row of the table, `pairs` cosines and as many sines.
template <class T>
void rotate_head(T* out, const T* x, const float* cos_sin, int64_t pairs, bool interleaved) {
  interleaved ? rotate_neighbours(out, x, cos_sin, cos_sin + pairs, pairs)
              : rotate_halves(out, x, cos_sin, cos_sin + pairs, pairs);
}

}  // namespace KESTREL_CPU
