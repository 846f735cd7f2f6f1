#include <algorithm>

#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/parallel.h"
#include "ops/fused_moe/requantize.h"

namespace KESTREL_CPU {
namespace {

// The bits of the largest |x| that is a number; signed, as the vector instructions are.
int32_t absmax(const float* x, int64_t width) {
  int32_t largest = 0;
  for (int64_t i = 0; i < width; ++i) {
    const int32_t magnitude = std::bit_cast<int32_t>(x[i]) & 0x7fffffff;
    const int32_t number = magnitude > 0x7f800000 ? 0 : magnitude;
    largest = std::max(largest, number);
  }
  return largest;
}

void quantize(e4m3* __restrict out, const float* __restrict x, float r, int64_t width) {
  for (int64_t i = 0; i < width; ++i) out[i] = from_float<e4m3>(x[i] * r);
}

}  // namespace

void requantize(const RequantizeArgs& a) {
  parallel_for(a.rows, 1 + 16384 / (a.width + 1), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* const x = a.values + row * a.values_stride;
      a.scale[row] = std::max(std::bit_cast<float>(absmax(x, a.width)) / 448.0f, 1e-6f);
      quantize(a.bits + row * a.bits_stride, x, 1.0f / a.scale[row], a.width);
    }
  });
}

}  // namespace KESTREL_CPU
