#include <algorithm>
#include <cmath>
#include <limits>

#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/math.h"
#include "kestrel/cpu/parallel.h"
#include "ops/merge_state/states.h"

namespace KESTREL_CPU {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// out may be a or b.
template <class T>
void merge_row(T* out, const T* a, const T* b, float a_weight, float b_weight, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    out[i] = from_float<T>(mul_add(a_weight, to_float(a[i]), b_weight * to_float(b[i])));
}

}  // namespace

void merge_state(const MergeStateArgs& args) {
  dispatch<bf16, f16, float>(args.dtype, [&]<class T>() {
    const auto element = [](const State& s, int64_t at) { return static_cast<T*>(s.data) + at; };
    const auto lse = [](const State& s, int64_t b, int64_t t, int64_t h) -> float& {
      return static_cast<float*>(s.data)[s.at(b, t, h)];
    };
    const int64_t grain = 1 + 16384 / std::max<int64_t>(args.width, 1);
    parallel_for(args.batch * args.tokens * args.heads, grain, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t h = row % args.heads, t = row / args.heads % args.tokens, b = row / args.heads / args.tokens;
        const float a_lse = lse(args.lse_a, b, t, h), b_lse = lse(args.lse_b, b, t, h);
        T* out = element(args.out, args.out.at(b, t, h));
        const T* of_a = element(args.out_a, args.out_a.at(b, t, h));
        const T* of_b = element(args.out_b, args.out_b.at(b, t, h));
        float& merged = lse(args.lse, b, t, h);
        // What a part without keys holds is not looked at: 0 * NaN would be NaN.
        if (a_lse == -kInfinity && b_lse == -kInfinity) {
          std::fill_n(out, args.width, from_float<T>(0.0f));
          merged = -kInfinity;
        } else if (b_lse == -kInfinity) {
          std::copy_n(of_a, args.width, out);
          merged = a_lse;
        } else if (a_lse == -kInfinity) {
          std::copy_n(of_b, args.width, out);
          merged = b_lse;
        } else {
          const float top = std::max(a_lse, b_lse);
          const float a_weight = exp(a_lse - top), b_weight = exp(b_lse - top), sum = a_weight + b_weight;
          merge_row(out, of_a, of_b, a_weight / sum, b_weight / sum, args.width);
          merged = top + std::log(sum);
        }
      }
    });
  });
}

}  // namespace KESTREL_CPU
