#include "kestrel/indices.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef KESTREL_CUDA
#include "kestrel/cuda.h"
#endif

namespace kestrel {
namespace {

int64_t offset_of(const Tensor& t, int64_t position) {
  int64_t offset = 0;
  for (int i = t.rank - 1; i >= 0; --i) {
    offset += position % t.shape[i] * t.stride[i];
    position /= t.shape[i];
  }
  return offset;
}

template <class Index>
BadIndex first_bad(const Tensor& t, const Index* values, int64_t low, int64_t high, bool skip_negative) {
  const int64_t count = t.numel();
  const bool adjacent = t.contiguous();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t value = values[adjacent ? i : offset_of(t, i)];
    if ((value < low && !(skip_negative && value < 0)) || value >= high) return {i, value};
  }
  return {};
}

BadIndex first_bad_of_dtype(const Tensor& t, const void* values, int64_t low, int64_t high, bool skip_negative) {
  return t.dtype == DType::kI64 ? first_bad(t, static_cast<const int64_t*>(values), low, high, skip_negative)
                                : first_bad(t, static_cast<const int32_t*>(values), low, high, skip_negative);
}

}  // namespace

bool checks_device_indices() {
  const char* value = std::getenv("KESTREL_CHECK");
  return value && std::strcmp(value, "1") == 0;
}

BadIndex find_bad_index(Stream stream, const Tensor& t, int64_t low, int64_t high, bool skip_negative) {
  if (t.empty()) return {};
  if (t.on_cpu()) return first_bad_of_dtype(t, t.data, low, high, skip_negative);
#ifdef KESTREL_CUDA
  if (checks_device_indices() && !is_capturing(stream)) {
    int64_t first = 0, last = 0;  // offsets of the outermost elements: strides may be negative
    for (int i = 0; i < t.rank; ++i) (t.stride[i] < 0 ? first : last) += (t.shape[i] - 1) * t.stride[i];
    const int64_t width = size_of(t.dtype);
    std::vector<char> host(static_cast<size_t>((last - first + 1) * width));
    copy_to_host(stream, t.device, host.data(), t.ptr<char>() + first * width, host.size());
    return first_bad_of_dtype(t, host.data() - first * width, low, high, skip_negative);
  }
#else
  (void)stream;
#endif
  return {};
}

}  // namespace kestrel
