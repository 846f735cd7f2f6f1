#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/parallel.h"
#include "kestrel/tensor.h"

namespace KESTREL_CPU {
namespace {

template <class T>
void sum_of_8(T* __restrict out, const T* __restrict x, int64_t stride, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    float sum = 0;
    for (int k = 0; k < 8; ++k) sum += to_float(x[k * stride + i]);
    out[i] = from_float<T>(sum);
  }
}

// A block of columns at a time, whose sums stay in the first-level cache over all k.
template <class T>
void sum_of_any(T* __restrict out, const T* __restrict x, int64_t count, int64_t stride, int64_t width) {
  constexpr int64_t kBlock = 512;
  float sums[kBlock];
  for (int64_t first = 0; first < width; first += kBlock) {
    const int64_t columns = width - first < kBlock ? width - first : kBlock;
    for (int64_t i = 0; i < columns; ++i) sums[i] = 0;
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < columns; ++i) sums[i] += to_float(x[k * stride + first + i]);
    for (int64_t i = 0; i < columns; ++i) out[first + i] = from_float<T>(sums[i]);
  }
}

}  // namespace

void moe_sum(const Tensor& out, const Tensor& x) {
  dispatch<bf16, f16, float>(x.dtype, [&]<class T>() {
    const int64_t count = x.shape[1], width = x.shape[2];
    parallel_for(x.shape[0], 1 + 16384 / (width * (count + 1)), [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        T* sums = out.ptr<T>() + t * out.stride[0];
        const T* rows = x.ptr<T>() + t * x.stride[0];
        if (count == 8)
          sum_of_8(sums, rows, x.stride[1], width);
        else
          sum_of_any(sums, rows, count, x.stride[1], width);
      }
    });
  });
}

}  // namespace KESTREL_CPU
