// Rows of 16-bit or 32-bit floats to fp32 and back. For f16 these are faster than a loop over to_float and from_float:
// g++ 12 does not vectorize with the machine's own conversions (F16C), whose NaNs alone differ from ours, in their
// bits.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "kestrel/cpu/convert.h"

namespace KESTREL_CPU {

template <class T>
inline void widen(float* __restrict out, const T* __restrict x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]);
}

template <class T>
inline void narrow(T* __restrict out, const float* __restrict x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(x[i]);
}

#ifdef __F16C__
template <>
inline void widen(float* __restrict out, const f16* __restrict x, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  for (; i < count; ++i) out[i] = to_float(x[i]);
}

template <>
inline void narrow(f16* __restrict out, const float* __restrict x, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) out[i] = from_float<f16>(x[i]);
}
#endif

}  // namespace KESTREL_CPU
