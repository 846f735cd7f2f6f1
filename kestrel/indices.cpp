#include "kestrel/indices.h"

#include <cstdlib>
#include <cstring>

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

}  // namespace

bool checks_indices(Stream stream, bool on_cpu) {
  if (on_cpu) return true;
#ifdef KESTREL_CUDA
  const char* value = std::getenv("KESTREL_CHECK");
  return value && std::strcmp(value, "1") == 0 && !is_capturing(stream);
#else
  (void)stream;
  return false;
#endif
}

HostCopy::HostCopy(Stream stream, const Tensor& t) : data_(t.data) {
  if (t.on_cpu() || t.empty()) return;
#ifdef KESTREL_CUDA
  int64_t first = 0, last = 0;  // offsets of the outermost elements: strides may be negative
  for (int i = 0; i < t.rank; ++i) (t.stride[i] < 0 ? first : last) += (t.shape[i] - 1) * t.stride[i];
  const int64_t width = size_of(t.dtype), bytes = (last - first + 1) * width;
  copy_ = std::make_unique_for_overwrite<char[]>(static_cast<size_t>(bytes));
  copy_to_host(stream, t.device, copy_.get(), t.ptr<char>() + first * width, static_cast<size_t>(bytes));
  data_ = copy_.get() - first * width;
#else
  (void)stream;
#endif
}

BadIndex find_bad_index(Stream stream, const Tensor& t, int64_t low, int64_t high, bool skip_negative) {
  if (t.empty() || !checks_indices(stream, t.on_cpu())) return {};
  const HostCopy host(stream, t);
  return t.dtype == DType::kI64 ? first_bad(t, host.ptr<int64_t>(), low, high, skip_negative)
                                : first_bad(t, host.ptr<int32_t>(), low, high, skip_negative);
}

}  // namespace kestrel
