// The gates on the device, in fp32.
#pragma once

#include "ops/activation/gate.h"

namespace kestrel {

__device__ __forceinline__ float gelu(float a) { return 0.5f * a * (1.0f + erff(a * 0.70710678f)); }
__device__ __forceinline__ float silu(float a) { return a / (1.0f + __expf(-a)); }
__device__ __forceinline__ float gelu_tanh(float a) {
  return a / (1.0f + __expf(-1.59576912f * (a + 0.044715f * a * a * a)));
}

template <Gate kGate>
__device__ __forceinline__ float apply_gate(float a, float b) {
  if constexpr (kGate == Gate::kGeluResidual) return gelu(a) * (b + 1.0f);
  if constexpr (kGate == Gate::kSilu) return silu(a) * b;
  if constexpr (kGate == Gate::kGelu) return gelu(a) * b;
  if constexpr (kGate == Gate::kGeluTanh) return gelu_tanh(a) * b;
}

}  // namespace kestrel
