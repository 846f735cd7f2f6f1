// Attention over two disjoint sets of keys, joined: weights w = exp(lse - max(lse_a, lse_b)), in fp32, rounded once,
//   out = (w_a out_a + w_b out_b) / (w_a + w_b)      lse = max(lse_a, lse_b) + log(w_a + w_b)
//   out, out_a, out_b [B, S, H, D] or [T, H, D] bf16 | f16 | f32, any strides, last dim contiguous
//   lse, lse_a, lse_b [B, H, S]    or [H, T]    f32, any strides, natural log
// A part with lse -inf is not looked at; both: zeros and -inf. out may be out_a or out_b, lse may be lse_a or lse_b.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

KESTREL_API void merge_state(Stream stream, Tensor out, Tensor lse, Tensor out_a, Tensor lse_a, Tensor out_b,
                             Tensor lse_b);

}  // namespace kestrel
