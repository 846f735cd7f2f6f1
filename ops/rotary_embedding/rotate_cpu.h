// The rotation of one head in place, for all CPU twins that rotate. Products and sums are rounded separately: the same
// bits at every instruction set level. Not inlined: all of them run this very code, so that NaN payloads agree too.
#pragma once

#include "kestrel/cpu/convert.h"

namespace KESTREL_CPU {

template <class T>
[[gnu::noinline]] void rotate_halves(T* __restrict first, T* __restrict second, const float* __restrict cosines,
                                     const float* __restrict sines, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = to_float(first[i]), b = to_float(second[i]);
    first[i] = from_float<T>(a * cosines[i] - b * sines[i]);
    second[i] = from_float<T>(b * cosines[i] + a * sines[i]);
  }
}

template <class T>
[[gnu::noinline]] void rotate_neighbours(T* __restrict x, const float* __restrict cosines,
                                         const float* __restrict sines, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
    x[2 * i] = from_float<T>(a * cosines[i] - b * sines[i]);
    x[2 * i + 1] = from_float<T>(b * cosines[i] + a * sines[i]);
  }
}

// cos_sin: a row of the table, `pairs` cosines and as many sines.
template <class T>
void rotate_head(T* x, const float* cos_sin, int64_t pairs, bool interleaved) {
  interleaved ? rotate_neighbours(x, cos_sin, cos_sin + pairs, pairs)
              : rotate_halves(x, x + pairs, cos_sin, cos_sin + pairs, pairs);
}

}  // namespace KESTREL_CPU
