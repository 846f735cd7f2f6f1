// The arguments both devices work on.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

struct LayernormArgs {
  Tensor out, x, weight, bias;
  Rows out_rows, x_rows;
  int64_t width;  // N
  float eps;
  bool reload;  // read x again for the last pass
};

}  // namespace kestrel
