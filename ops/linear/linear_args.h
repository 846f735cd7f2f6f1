// What both devices work on, after the checks.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

enum class LinearActivation { kNone, kGelu, kGeluTanh, kSilu, kGeluResidualGate, kSiluGate, kGeluGate, kGeluTanhGate };

constexpr bool is_gate(LinearActivation a) { return a >= LinearActivation::kGeluResidualGate; }

struct LinearArgs {
  LinearActivation activation;
  Tensor out, x, w;
  std::optional<Tensor> b, residual;
  Rows out_rows, x_rows, residual_rows;
  int64_t columns;  // of out
  int64_t depth;    // K
  // fused_mlp's hidden layer: cuBLASLt's own tanh GELU will do, whose error of 2e-4 is below the rounding of bf16.
  bool hidden = false;
};

// The same for all shapes, so that the algorithm depends on nothing else: what NVIDIA recommends for Hopper.
inline constexpr int64_t kLinearWorkspaceBytes = 32 << 20;

namespace cuda {
void linear(Stream stream, const LinearArgs& args, const std::optional<Tensor>& workspace);
}

}  // namespace kestrel
