// Index tensors (slots, pages, positions, ids): the search for the first one out of range.
#pragma once

#include <kestrel/tensor.h>

#include <memory>

namespace kestrel {

struct BadIndex {
  int64_t position = -1;  // in row-major order; -1 where all are good
  int64_t value = 0;
};

// Whether index tensors are looked at: on the CPU always; on CUDA where KESTREL_CHECK=1 and no graph is being captured.
bool checks_indices(Stream stream, bool on_cpu);

// int32 or int64. Looks where checks_indices().
BadIndex find_bad_index(Stream stream, const Tensor& tensor, int64_t low, int64_t high, bool skip_negative);

// A tensor as the host reads it: of one of the GPU the elements are copied, behind the stream's work.
class HostCopy {
 public:
  HostCopy(Stream stream, const Tensor& tensor);
  template <class T>
  const T* ptr() const {
    return static_cast<const T*>(data_);
  }

 private:
  std::unique_ptr<char[]> copy_;
  const void* data_;
};

}  // namespace kestrel
