// Tensors whose leading dimensions count tokens: [T, ...] or [B, S, ...].
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

// The tokens as rows, uniform where [B, S] folds into one stride; `inner` dimensions are a token's own.
inline Rows token_rows(const Tensor& t, int inner) {
  const auto uniform = [](int64_t count, int64_t stride) { return Rows{count, count, stride, 0}; };
  if (t.rank - inner == 1 || t.shape[1] == 1) return uniform(t.shape[0], t.stride[0]);
  const int64_t count = t.shape[0] * t.shape[1];
  if (t.shape[0] == 1 || t.stride[0] == t.shape[1] * t.stride[1]) return uniform(count, t.stride[1]);
  return {count, t.shape[1], t.stride[1], t.stride[0]};
}

}  // namespace kestrel
