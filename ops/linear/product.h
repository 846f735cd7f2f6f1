// One matrix product by cuBLASLt, without kernels of our own.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel::cuda {

struct Memory {
  void* data = nullptr;
  int64_t bytes = 0;
};

// out = x w^T + residual + bias, or its tanh GELU; fp32 sums rounded once. Strides are of rows, at least as wide as
// these.
struct Product {
  DLDevice device;  // the current one
  DType dtype;      // of x, w, bias and residual
  DType out_dtype;  // dtype; or fp32 where there is neither residual nor bias
  int64_t rows, columns, depth;
  const void *x, *w;
  int64_t x_stride, w_stride;
  void* out;
  int64_t out_stride;
  const void* residual = nullptr;  // may be out
  int64_t residual_stride = 0;
  const void* bias = nullptr;  // at a multiple of 16 bytes
  bool gelu = false;           // with a bias
};

// False where cuBLASLt has no algorithm for the product: nothing is launched then.
bool multiply(Stream stream, const Product& product, Memory workspace);

}  // namespace kestrel::cuda
