// out = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467), in
// fp32, one rounding. With `residual`, first residual += x in place, rounded to its dtype, then the norm of what was
// stored.
//   x [..., N] bf16 | f16 | f32, N <= 65536       weight [N] as x       out, residual like x
//   rows of any stride; out may be x, residual shares memory with neither
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

KESTREL_API void rmsnorm(Stream stream, Tensor out, Tensor x, Tensor weight, float eps, std::optional<Tensor> residual);

}  // namespace kestrel
