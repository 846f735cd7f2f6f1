// out = gate(x[..., :N], x[..., N:]) with the two halves of x named a and b, in fp32, rounded once:
//   gelu_residual      gelu(a) * (b + 1)      exact (erf) GELU
//   silu_and_mul       silu(a) * b            SwiGLU (Shazeer 2020, arXiv:2002.05202)
//   gelu_and_mul       gelu(a) * b            GEGLU, exact
//   gelu_tanh_and_mul  gelu_tanh(a) * b       GEGLU, tanh form
//   x [..., 2N] bf16 | f16 | f32, any N       out [..., N] as x       rows of any stride; out overlaps no part of x
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

KESTREL_API void gelu_residual(Stream stream, Tensor out, Tensor x);
KESTREL_API void silu_and_mul(Stream stream, Tensor out, Tensor x);
KESTREL_API void gelu_and_mul(Stream stream, Tensor out, Tensor x);
KESTREL_API void gelu_tanh_and_mul(Stream stream, Tensor out, Tensor x);

}  // namespace kestrel
