// out[..., :] = table[ids[...], :], copied bit for bit.
//   table [V, N] any dtype of whole bytes, rows of any stride
//   ids [...] i32 | i64, rank 0 to 5, folding into two strides
//   out [..., N] as table, rows of any stride; it overlaps no part of table
// An id outside [0, V) is an error before any write on the CPU; on CUDA its row becomes zeros.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

KESTREL_API void embedding(Stream stream, Tensor out, Tensor table, Tensor ids);

}  // namespace kestrel
