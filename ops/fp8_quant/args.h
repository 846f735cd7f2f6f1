// The arguments both devices work on. x may be fp32 with kRow: for fused_moe.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

enum class Fp8Scale { kRow, kTensor, kGiven };

struct Fp8QuantArgs {
  Fp8Scale mode;
  Tensor out_bits, x;
  Tensor out_scale;          // kRow, kTensor
  Value<float> given_scale;  // kGiven
  bool settled = false;      // kRow of 16 bits: x and what the outputs replace are older than the preceding kernel
};

}  // namespace kestrel
