// out = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016, arXiv:1607.06450); mean
// and biased variance in fp32, the variance from the differences to the mean (two passes), one rounding.
//   x [..., N] bf16 | f16, N <= 65536       weight, bias [N] as x       out like x
//   rows of any stride; out may be x
// Two forms of one op: x kept in registers between the passes, or read again (fewer registers, more rows in flight).
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

KESTREL_API void layernorm(Stream stream, Tensor out, Tensor x, Tensor weight, Tensor bias, float eps);
KESTREL_API void layernorm_reload(Stream stream, Tensor out, Tensor x, Tensor weight, Tensor bias, float eps);

}  // namespace kestrel
