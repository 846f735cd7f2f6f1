// The arguments both devices work on.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

struct RmsnormArgs {
  Tensor out, x, weight;
  std::optional<Tensor> residual;
  Rows out_rows, x_rows, residual_rows;
  int64_t width;  // N
  float eps;
};

}  // namespace kestrel
