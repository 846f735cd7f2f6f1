// The arguments both devices work on.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

enum class Fp8Scale { kRow, kTensor, kGiven };

struct Fp8QuantArgs {
  Fp8Scale mode;
  Tensor out_bits, x;
  Tensor out_scale;          // kRow, kTensor
  Value<float> given_scale;  // kGiven
};

}  // namespace kestrel
