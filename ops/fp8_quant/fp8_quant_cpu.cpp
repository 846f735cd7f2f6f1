#include <algorithm>
#include <atomic>

#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/parallel.h"
#include "ops/fp8_quant/args.h"

namespace KESTREL_CPU {
namespace {

template <class T>
constexpr int16_t kInfinity = 0;
template <>
constexpr int16_t kInfinity<bf16> = 0x7f80;
template <>
constexpr int16_t kInfinity<f16> = 0x7c00;

// The largest |x| that is a number, as its bits: without the sign these are ordered like the values. Signed, because
// 16 bits without a sign have no maximum instruction in SSE2.
template <class T>
int16_t absmax(const T* x, int64_t width) {
  int16_t largest = 0;
  for (int64_t i = 0; i < width; ++i) {
    const int16_t magnitude = x[i].bits & 0x7fff;
    const int16_t number = magnitude > kInfinity<T> ? int16_t{0} : magnitude;
    largest = std::max(largest, number);
  }
  return largest;
}

template <class T>
float scale_of(int16_t magnitude) {
  return std::max(to_float(T{static_cast<uint16_t>(magnitude)}) / 448.0f, 1e-6f);
}

template <class T>
void quantize(e4m3* __restrict out, const T* __restrict x, float scale, int64_t width) {
  const float r = 1.0f / scale;
  for (int64_t i = 0; i < width; ++i) out[i] = from_float<e4m3>(to_float(x[i]) * r);
}

}  // namespace

void fp8_quant(const Fp8QuantArgs& args) {
  dispatch<bf16, f16>(args.x.dtype, [&]<class T>() {
    const int64_t rows = args.x.shape[0], width = args.x.shape[1];
    const int64_t grain = 1 + 16384 / (width + 1);
    const auto row_of_x = [&](int64_t r) { return args.x.ptr<T>() + r * args.x.stride[0]; };
    const auto row_of_bits = [&](int64_t r) { return args.out_bits.ptr<e4m3>() + r * args.out_bits.stride[0]; };
    if (args.mode == Fp8Scale::kRow) {
      float* scales = args.out_scale.ptr<float>();
      parallel_for(rows, grain, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
          scales[r] = scale_of<T>(absmax(row_of_x(r), width));
          quantize(row_of_bits(r), row_of_x(r), scales[r], width);
        }
      });
      return;
    }
    float scale = args.given_scale.tensor ? *args.given_scale.tensor->ptr<float>() : args.given_scale.host;
    if (args.mode == Fp8Scale::kTensor) {
      std::atomic<int16_t> largest{0};
      parallel_for(rows, grain, [&](int64_t first, int64_t last) {
        int16_t mine = 0;
        for (int64_t r = first; r < last; ++r) mine = std::max(mine, absmax(row_of_x(r), width));
        int16_t seen = largest.load();
        while (mine > seen && !largest.compare_exchange_weak(seen, mine)) continue;
      });
      scale = *args.out_scale.ptr<float>() = scale_of<T>(largest.load());
    }
    parallel_for(rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) quantize(row_of_bits(r), row_of_x(r), scale, width);
    });
  });
}

}  // namespace KESTREL_CPU
