// The factors of a token's heads and their use on one head, for all CPU twins that scale by tau.
#pragma once

#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/index.h"
#include "kestrel/cpu/math.h"

namespace KESTREL_CPU {

template <class T, class Tau>
void tau_factors(float* __restrict factors, const T* __restrict tok, const Tau* __restrict tau, int64_t heads) {
  for (int64_t h = 0; h < heads; ++h) factors[h] = tanh(to_float(tok[h])) + to_float(tau[h]);
}

// factors[h] = tanh(tok[h]) + tau_pos_table[position, first_head + h]
template <class T>
void tau_factors(float* factors, const T* tok, const Tensor& tau_pos_table, int64_t position, int64_t first_head,
                 int64_t heads) {
  const int64_t offset = position * tau_pos_table.stride[0] + first_head;
  if (tau_pos_table.dtype == DType::kF32)
    tau_factors(factors, tok, tau_pos_table.ptr<float>() + offset, heads);
  else
    tau_factors(factors, tok, tau_pos_table.ptr<T>() + offset, heads);
}

// out is x or lies apart from it. Not inlined, as in rotate_cpu.h: NaN payloads agree too.
template <class T>
[[gnu::noinline]] void scale_head(T* out, const T* x, float factor, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = from_float<T>(to_float(x[i]) * factor);
}

}  // namespace KESTREL_CPU
