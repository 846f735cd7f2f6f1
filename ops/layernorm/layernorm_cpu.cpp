#include <cmath>
#include <vector>

#include "kestrel/cpu/math.h"
#include "kestrel/cpu/parallel.h"
#include "kestrel/cpu/rows.h"
#include "ops/layernorm/args.h"

namespace KESTREL_CPU {
namespace {

// Four sums side by side: a single one would wait for each addition.
float sum(const float* row, int64_t width) {
  const int64_t quarter = width / 4;
  float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < quarter; ++i) {
    a += row[i];
    b += row[i + quarter];
    c += row[i + 2 * quarter];
    d += row[i + 3 * quarter];
  }
  for (int64_t i = 4 * quarter; i < width; ++i) a += row[i];
  return (a + b) + (c + d);
}

inline float plus_square(float sum, float difference) { return mul_add(difference, difference, sum); }

float sum_of_squares(const float* row, float mean, int64_t width) {
  const int64_t quarter = width / 4;
  float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < quarter; ++i) {
    a = plus_square(a, row[i] - mean);
    b = plus_square(b, row[i + quarter] - mean);
    c = plus_square(c, row[i + 2 * quarter] - mean);
    d = plus_square(d, row[i + 3 * quarter] - mean);
  }
  for (int64_t i = 4 * quarter; i < width; ++i) a = plus_square(a, row[i] - mean);
  return (a + b) + (c + d);
}

void normalize(float* __restrict row, const float* __restrict weight, const float* __restrict bias, float mean,
               float rstd, int64_t width) {
  for (int64_t i = 0; i < width; ++i) row[i] = mul_add((row[i] - mean) * rstd, weight[i], bias[i]);
}

}  // namespace

void layernorm(const LayernormArgs& args) {
  dispatch<bf16, f16>(args.x.dtype, [&]<class T>() {
    const int64_t width = args.width;
    parallel_for(args.x_rows.count, 1 + 16384 / width, [&](int64_t first, int64_t last) {
      // weight, bias and the row in hand as fp32
      static thread_local std::vector<float> scratch;
      if (scratch.size() < static_cast<size_t>(3 * width)) scratch.resize(3 * width);
      float* weight = scratch.data();
      float* bias = weight + width;
      float* row = bias + width;
      widen(weight, args.weight.ptr<T>(), width);
      widen(bias, args.bias.ptr<T>(), width);
      const float count = static_cast<float>(width);
      for (int64_t r = first; r < last; ++r) {
        widen(row, args.x.ptr<T>() + args.x_rows.offset(r), width);
        const float mean = sum(row, width) / count;
        const float rstd = 1.0f / std::sqrt(sum_of_squares(row, mean, width) / count + args.eps);
        normalize(row, weight, bias, mean, rstd, width);
        narrow(args.out.ptr<T>() + args.out_rows.offset(r), row, width);
      }
    });
  });
}

}  // namespace KESTREL_CPU
