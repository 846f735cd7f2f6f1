// The gates on the device, in fp32, for outputs of 16 bits and of fp32.
#pragma once

#include "kestrel/hopper/numeric.cuh"
#include "ops/activation/gate.h"

namespace kestrel {

// x times the normal distribution function. Its tail is exp(-x^2/2) times a polynomial in 1 / (1 + c |x|), our own
// minimax fits, which keeps its relative accuracy where 1 + erf would cancel: 1.2e-6 of degree 6, 9e-9 of degree 9.
// erff would cost 740 x 1024 a fifth of its time.
template <class T>
__device__ __forceinline__ float gelu(float x) {
  const float a = fabsf(x);
  float p, t;
  if constexpr (sizeof(T) == 2) {
    t = fast_reciprocal(fmaf(a, 0.42f, 1.0f));
    p = fmaf(0.0647723079f, t, -0.260798395f);
    p = fmaf(p, t, 0.297613502f);
    p = fmaf(p, t, 0.0428542979f);
    p = fmaf(p, t, 0.190875158f);
    p = fmaf(p, t, 0.164520890f);
    p = fmaf(p, t, 1.62822354e-4f);
  } else {
    t = 1.0f / fmaf(a, 0.33f, 1.0f);
    p = fmaf(-0.0263886005f, t, 0.151245549f);
    p = fmaf(p, t, -0.328255117f);
    p = fmaf(p, t, 0.299083859f);
    p = fmaf(p, t, -0.112614520f);
    p = fmaf(p, t, 0.148820698f);
    p = fmaf(p, t, 0.102778636f);
    p = fmaf(p, t, 0.133863643f);
    p = fmaf(p, t, 0.131458610f);
    p = fmaf(p, t, 7.26399003e-6f);
  }
  const float tail = fast_exp2(a * a * -0.721347520f) * p;
  return x * (x > 0.0f ? 1.0f - tail : tail);
}

// x / (1 + exp(-x)): 0 for a large negative x, where the quotient by infinity is.
__device__ __forceinline__ float silu(float x) { return x * fast_reciprocal(1.0f + fast_exp2(x * -1.44269504f)); }

// x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu_tanh(float x) {
  return x * fast_reciprocal(1.0f + fast_exp2(-2.30220820f * fmaf(0.044715f * x * x, x, x)));
}

template <class T, Gate kGate>
__device__ __forceinline__ float apply_gate(float a, float b) {
  if constexpr (kGate == Gate::kSilu) return silu(a) * b;
  if constexpr (kGate == Gate::kGelu) return gelu<T>(a) * b;
  if constexpr (kGate == Gate::kGeluTanh) return gelu_tanh(a) * b;
  const float g = gelu<T>(a);
  return fmaf(g, b, g);
}

template <class T>
__device__ __forceinline__ float apply_gate(Gate gate, float a, float b) {
  switch (gate) {
    case Gate::kGeluResidual: return apply_gate<T, Gate::kGeluResidual>(a, b);
    case Gate::kSilu: return apply_gate<T, Gate::kSilu>(a, b);
    case Gate::kGelu: return apply_gate<T, Gate::kGelu>(a, b);
    case Gate::kGeluTanh: return apply_gate<T, Gate::kGeluTanh>(a, b);
  }
  return a;
}

}  // namespace kestrel
