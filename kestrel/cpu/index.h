// Index tensors (slots, pages, positions, ids) in the CPU twins: int32 or int64, as their contract says.
#pragma once

#include <kestrel/tensor.h>

#ifndef KESTREL_CPU
#define KESTREL_CPU kestrel::cpu::v1
#endif

namespace KESTREL_CPU {

inline int64_t index_at(const Tensor& t, int64_t offset) {
  return t.dtype == DType::kI64 ? t.ptr<int64_t>()[offset] : t.ptr<int32_t>()[offset];
}

}  // namespace KESTREL_CPU
