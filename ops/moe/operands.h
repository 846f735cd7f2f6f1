// The checks that the ops over experts share.
#pragma once

#include <string>
#include <string_view>

#include "kestrel/contract.h"
#include "ops/moe/moe_args.h"

namespace kestrel {

struct NamedGate {
  std::string_view name;
  Gate value;
};
inline constexpr NamedGate kGates[] = {
    {"gelu_residual", Gate::kGeluResidual},
    {"silu_and_mul", Gate::kSilu},
    {"gelu_and_mul", Gate::kGelu},
    {"gelu_tanh_and_mul", Gate::kGeluTanh},
};

inline std::optional<Gate> gate_named(Contract& c, std::string_view name) {
  if (name.empty()) return std::nullopt;
  for (const NamedGate& g : kGates)
    if (g.name == name) return g.value;
  c.require(false, "activation", "gelu_residual, silu_and_mul, gelu_and_mul, gelu_tanh_and_mul or none",
            std::string(name));
  return std::nullopt;
}

// An operand with the names of its parts; a scale for e4m3 alone.
struct Operand {
  const char* name;
  const Tensor& tensor;
  const char* scale_name = nullptr;
  const Tensor* scale = nullptr;
};

inline ExpertWeights check_weights(Contract& c, const Operand& w, const MoeArgs& args, Dim* experts, Dim* rows) {
  Arg arg = c.in(w.name, w.tensor);
  if (w.scale)
    arg.dtype({DType::kE4M3, DType::kU8});
  else
    arg.dtype({args.dtype});
  arg.shape({*experts, *rows, args.depth}).last_contiguous();
  ExpertWeights weights{w.tensor.data, w.tensor.stride[0], w.tensor.stride[1]};
  if (w.scale) {
    c.in(w.scale_name, *w.scale).dtype({DType::kF32}).shape({*experts, *rows}).last_contiguous();
    weights.scale = w.scale->ptr<float>();
    weights.scale_stride = w.scale->stride[0];
  }
  return weights;
}

// The rows of every expert from `row` on: the second half of two that stand in one tensor.
inline ExpertWeights from_row(ExpertWeights weights, int64_t row, DType dtype) {
  weights.data = static_cast<const char*>(weights.data) + row * weights.row_stride * size_of(dtype);
  if (weights.scale) weights.scale += row;
  return weights;
}

}  // namespace kestrel
