// bits = e4m3(values / scale), scale = max(absmax / 448, 1e-6), row by row: fp8_quant_row for fp32.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

struct RequantizeArgs {
  e4m3* bits;
  float* scale;
  const float* values;
  int64_t bits_stride, values_stride;  // of rows
  int64_t rows, width;
};

}  // namespace kestrel
