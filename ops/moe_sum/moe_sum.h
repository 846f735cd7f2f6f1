// out[t] = x[t, 0] + x[t, 1] + ... + x[t, K-1], in fp32 in that order, one rounding: the last step of a layer of
// experts.
//   x [T, K, N] bf16 | f16 | f32, any K (zero gives zeros)       out [T, N] as x       last dimension contiguous
//   out overlaps no part of x
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

KESTREL_API void moe_sum(Stream stream, Tensor out, Tensor x);

}  // namespace kestrel
