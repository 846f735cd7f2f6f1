#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <type_traits>

#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/parallel.h"
#include "ops/fp8_quant/args.h"

namespace KESTREL_CPU {
namespace {

// The bits of a value. Signed, because without a sign 16 bits have no maximum instruction in SSE2.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;

template <class T>
constexpr Bits<T> kInfinity = 0;
template <>
constexpr int16_t kInfinity<bf16> = 0x7f80;
template <>
constexpr int16_t kInfinity<f16> = 0x7c00;
template <>
constexpr int32_t kInfinity<float> = 0x7f800000;

// The largest |x| that is a number, as its bits: without the sign these are ordered like the values.
template <class T>
Bits<T> absmax(const T* x, int64_t width) {
  Bits<T> largest = 0;
  for (int64_t i = 0; i < width; ++i) {
    const Bits<T> magnitude = std::bit_cast<Bits<T>>(x[i]) & std::numeric_limits<Bits<T>>::max();
    const Bits<T> number = magnitude > kInfinity<T> ? Bits<T>{0} : magnitude;
    largest = std::max(largest, number);
  }
  return largest;
}

template <class T>
float scale_of(Bits<T> magnitude) {
  return std::max(to_float(std::bit_cast<T>(magnitude)) / 448.0f, 1e-6f);
}

template <class T>
void quantize(e4m3* __restrict out, const T* __restrict x, float scale, int64_t width) {
  const float r = 1.0f / scale;
  for (int64_t i = 0; i < width; ++i) out[i] = from_float<e4m3>(to_float(x[i]) * r);
}

}  // namespace

void fp8_quant(const Fp8QuantArgs& args) {
  dispatch<bf16, f16, float>(args.x.dtype, [&]<class T>() {
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
      std::atomic<Bits<T>> largest{0};
      parallel_for(rows, grain, [&](int64_t first, int64_t last) {
        Bits<T> mine = 0;
        for (int64_t r = first; r < last; ++r) mine = std::max(mine, absmax(row_of_x(r), width));
        Bits<T> seen = largest.load();
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
