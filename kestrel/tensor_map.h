// The descriptor of a tensor that the copy engine (TMA) reads boxes of. It holds addresses and goes to the kernel by
// value, inside its __grid_constant__ arguments; making one takes the caller less than a microsecond.
#pragma once

#include <cuda.h>

#include <cstdint>

#include <kestrel/dtype.h>

namespace kestrel {

constexpr int kMostBoxDims = 5;

struct TensorBox {
  DType dtype;                   // of 16 or 8 bits
  const void* data;              // at a multiple of 16 bytes
  int64_t size[kMostBoxDims];    // innermost first; a zero ends it
  int64_t stride[kMostBoxDims];  // in elements; that of the innermost is 1, the others are multiples of 16 bytes
  uint32_t box[kMostBoxDims];    // at most `span` bytes in the innermost, at most 256 elements in each
  int span = 128;                // or 64: bytes from line to line of a box
};

// Boxes are swizzled over `span` bytes: the 16 bytes c of line r lie at r * span + (c ^ r * span / 128 % (span / 16)) *
// 16, of 128 bytes r * 128 + (c ^ r % 8) * 16. What lies outside the tensor reads as zero.
CUtensorMap tensor_map(const TensorBox& tensor);

}  // namespace kestrel
