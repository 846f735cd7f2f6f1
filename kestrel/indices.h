// Index tensors (slots, pages, positions, ids): the search for the first one out of range.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

struct BadIndex {
  int64_t position = -1;  // in row-major order; -1 where all are good
  int64_t value = 0;
};

// int32 or int64. Looks on the CPU always; on CUDA only where KESTREL_CHECK=1 and no graph is being captured.
BadIndex find_bad_index(Stream stream, const Tensor& tensor, int64_t low, int64_t high, bool skip_negative);

bool checks_device_indices();  // KESTREL_CHECK=1

}  // namespace kestrel
