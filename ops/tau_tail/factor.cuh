// The factor of a head and its use, for all kernels that scale by tau: every operation is written out, so that all of
// them give the same bits.
#pragma once

#include "kestrel/hopper/vec.cuh"

namespace kestrel {

__device__ __forceinline__ float tau_factor(float tok, float tau) { return __fadd_rn(tanhf(tok), tau); }

template <class T, int kVec>
__device__ __forceinline__ Vec<T, kVec> scale_vector(const Vec<T, kVec>& v, float factor) {
  float f[kVec];
  to_floats(v, f);
#pragma unroll
  for (int i = 0; i < kVec; ++i) f[i] = __fmul_rn(f[i], factor);
  return from_floats<T>(f);
}

}  // namespace kestrel
