// The factor of a head, for all kernels that scale by tau: its operations are written out, so that all of them have the
// same bits.
#pragma once

#include "kestrel/hopper/vec.cuh"

namespace kestrel {

__device__ __forceinline__ float tau_factor(float tok, float tau) { return __fadd_rn(tanhf(tok), tau); }

}  // namespace kestrel
