// The activations of a linear layer on the device, in fp32.
#pragma once

#include "ops/activation/gate.cuh"
#include "ops/linear/linear_args.h"

namespace kestrel::cuda {

template <class T, LinearActivation kKind>
__device__ __forceinline__ float activate(float a, float g) {
  using Kind = LinearActivation;
  if constexpr (kKind == Kind::kGelu) return gelu<T>(a);
  if constexpr (kKind == Kind::kGeluTanh) return gelu_tanh(a);
  if constexpr (kKind == Kind::kSilu) return silu(a);
  if constexpr (kKind == Kind::kGeluResidualGate) return apply_gate<T, Gate::kGeluResidual>(a, g);
  if constexpr (kKind == Kind::kSiluGate) return apply_gate<T, Gate::kSilu>(a, g);
  if constexpr (kKind == Kind::kGeluGate) return apply_gate<T, Gate::kGelu>(a, g);
  if constexpr (kKind == Kind::kGeluTanhGate) return apply_gate<T, Gate::kGeluTanh>(a, g);
  return a;
}

// body.operator()<kKind>(), on either side
template <class Body>
__host__ __device__ __forceinline__ void dispatch_kind(LinearActivation kind, Body&& body) {
  using Kind = LinearActivation;
  switch (kind) {
    case Kind::kNone: return body.template operator()<Kind::kNone>();
    case Kind::kGelu: return body.template operator()<Kind::kGelu>();
    case Kind::kGeluTanh: return body.template operator()<Kind::kGeluTanh>();
    case Kind::kSilu: return body.template operator()<Kind::kSilu>();
    case Kind::kGeluResidualGate: return body.template operator()<Kind::kGeluResidualGate>();
    case Kind::kSiluGate: return body.template operator()<Kind::kSiluGate>();
    case Kind::kGeluGate: return body.template operator()<Kind::kGeluGate>();
    case Kind::kGeluTanhGate: return body.template operator()<Kind::kGeluTanhGate>();
  }
}

}  // namespace kestrel::cuda
