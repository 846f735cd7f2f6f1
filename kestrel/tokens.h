// Tensors whose leading dimensions count tokens: [T, ...] or [B, S, ...].
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

// The tokens as rows; `inner` dimensions are a token's own.
inline Rows token_rows(const Tensor& t, int inner) {
  if (t.rank - inner == 1) return {t.shape[0], t.shape[0], t.stride[0], 0};
  return {t.shape[0] * t.shape[1], t.shape[1], t.stride[1], t.stride[0]};
}

}  // namespace kestrel
