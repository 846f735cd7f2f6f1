// out = activation(x w^T + b) + residual. Sums, bias, activation and residual in fp32 (or wider), one rounding.
//   x [..., K] bf16 | f16 | f32   w [N, K]   b [N], or none   out [..., N]   residual as out, or none
//   activation: "" (none), "gelu" (erf), "gelu_tanh", "silu"; or a gate, "gelu_residual", "silu_and_mul",
//   "gelu_and_mul", "gelu_tanh_and_mul": w [2I, K], b [2I], out [..., I] = gate(a, g) + residual with a from the first
//   I rows of w and g from the last I (ops/activation).
// Any M, N, K, zero too; rows of x, w, out and residual of any stride; all of one dtype. out may be residual and
// overlaps nothing else. A row of out has the same bits whatever the rows beside it hold; on the CPU also however many
// they are, where on CUDA their number, strides and 16-byte alignment choose the kernel.
// On CUDA at few rows w and b are read while the kernel before may still run: as weights, which no kernel writes in the
// same run.
// workspace: for CUDA u8 [linear_workspace_bytes()] or more, at a multiple of 256, free again for the next call on the
// stream; what it holds is lost. Without one the call is right but slower: most activations by a plain kernel.
#pragma once

#include <kestrel/tensor.h>

#include <string_view>

namespace kestrel {

KESTREL_API int64_t linear_workspace_bytes();  // the same for every call of either op

KESTREL_API void linear(Stream stream, Tensor out, std::optional<Tensor> workspace, Tensor x, Tensor w,
                        std::optional<Tensor> b, std::optional<Tensor> residual, std::string_view activation);

// out = residual + gelu_tanh(x w1^T + b1) w2^T + b2; hidden [..., H] (or [M, H]) is scratch of x's dtype:
// what gelu_tanh gives, rounded.
//   x [..., K]   w1 [H, K]   b1 [H]   w2 [N, H]   b2 [N]   out, residual [..., N]   out may be residual
KESTREL_API void fused_mlp(Stream stream, Tensor out, Tensor hidden, std::optional<Tensor> workspace, Tensor x,
                           Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor residual);

}  // namespace kestrel
