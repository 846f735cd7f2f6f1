// The gates on the CPU, in fp32, for the twins of all ops that apply one.
#pragma once

#include "kestrel/cpu/math.h"
#include "ops/activation/gate.h"

namespace KESTREL_CPU {

template <Gate kGate>
inline float apply_gate(float a, float b) {
  if constexpr (kGate == Gate::kGeluResidual) return gelu(a) * (b + 1.0f);
  if constexpr (kGate == Gate::kSilu) return silu(a) * b;
  if constexpr (kGate == Gate::kGelu) return gelu(a) * b;
  if constexpr (kGate == Gate::kGeluTanh) return gelu_tanh(a) * b;
}

// a[i] = gate(a[i], b[i])
inline void apply_gate(Gate gate, int64_t count, float* __restrict a, const float* __restrict b) {
  dispatch_gate(gate, [&]<Gate kGate>() {
    for (int64_t i = 0; i < count; ++i) a[i] = apply_gate<kGate>(a[i], b[i]);
  });
}

}  // namespace KESTREL_CPU
