// bits = e4m3(clamp(x * r, -448, 448)) with r = 1 / scale, both rounded to fp32; x ~ bits * scale. To the bit:
// division, product and conversion each round to nearest even. The scale is max(absmax / 448, 1e-6),
//   fp8_quant_row     of each row, out_scale [M] f32
//   fp8_quant_tensor  of the whole tensor, out_scale of one element, f32
//   fp8_quant_static  or the caller's: a number > 0, or a tensor of one element, f32
// NaN becomes NaN (0x7f) and does not enter absmax; with an Inf, absmax is Inf: Inf becomes NaN, the rest zero.
//   x [M, N] bf16 | f16, any M, N       out_bits [M, N] e4m3 | u8
//   rows of any stride; outputs overlap no part of x
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

KESTREL_API void fp8_quant_row(Stream stream, Tensor out_bits, Tensor out_scale, Tensor x);
KESTREL_API void fp8_quant_tensor(Stream stream, Tensor out_bits, Tensor out_scale, Tensor x);
KESTREL_API void fp8_quant_static(Stream stream, Tensor out_bits, Value<float> scale, Tensor x);

}  // namespace kestrel
