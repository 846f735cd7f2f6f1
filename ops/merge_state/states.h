// The arguments both devices work on: each tensor as [B, S, H], whatever its layout.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

struct State {
  void* data;
  int64_t batch, token, head;  // strides
  constexpr int64_t at(int64_t b, int64_t s, int64_t h) const { return b * batch + s * token + h * head; }
};

struct MergeStateArgs {
  DType dtype;
  int64_t batch, tokens, heads, width;
  State out, out_a, out_b;
  State lse, lse_a, lse_b;
};

}  // namespace kestrel
