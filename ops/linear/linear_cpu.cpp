#include "kestrel/cpu/matmul.h"
#include "kestrel/cpu/rows.h"
#include "ops/activation/gate_cpu.h"
#include "ops/linear/linear_args.h"

namespace KESTREL_CPU {
namespace {

using Kind = LinearActivation;

template <class F>
inline void each(int64_t count, float* __restrict a, F f) {
  for (int64_t i = 0; i < count; ++i) a[i] = f(a[i], i);
}

// In place on a; g is the other half of a gate.
void activate(Kind kind, int64_t count, float* __restrict a, const float* __restrict g) {
  switch (kind) {
    case Kind::kNone: return;
    case Kind::kGelu: return each(count, a, [](float v, int64_t) { return gelu(v); });
    case Kind::kGeluTanh: return each(count, a, [](float v, int64_t) { return gelu_tanh(v); });
    case Kind::kSilu: return each(count, a, [](float v, int64_t) { return silu(v); });
    case Kind::kGeluResidualGate: return apply_gate(Gate::kGeluResidual, count, a, g);
    case Kind::kSiluGate: return apply_gate(Gate::kSilu, count, a, g);
    case Kind::kGeluGate: return apply_gate(Gate::kGelu, count, a, g);
    case Kind::kGeluTanhGate: return apply_gate(Gate::kGeluTanh, count, a, g);
  }
}

template <int kPanels, class T>
void linear(const LinearArgs& args) {
  const T* const b = args.b ? args.b->ptr<T>() : nullptr;
  const T* const w = args.w.ptr<T>();
  const int64_t stride = args.w.stride[0], columns = args.columns;
  const Weights<T> weights{{w, w + (kPanels - 1) * columns * stride}, {stride, stride}, columns, args.depth};
  const auto x_row = [&](int64_t row) { return args.x.ptr<T>() + args.x_rows.offset(row); };

  matmul<kPanels>(weights, args.x_rows.count, x_row,
                  [&](int64_t row, int64_t first, int64_t count, float* a, float* g) {
                    if (b) {
                      each(count, a, [=](float v, int64_t i) { return v + to_float(b[first + i]); });
                      if (kPanels == 2)
                        each(count, g, [=](float v, int64_t i) { return v + to_float(b[columns + first + i]); });
                    }
                    activate(args.activation, count, a, g);
                    if (args.residual) {
                      const T* residual = args.residual->ptr<T>() + args.residual_rows.offset(row) + first;
                      each(count, a, [=](float v, int64_t i) { return v + to_float(residual[i]); });
                    }
                    narrow(args.out.ptr<T>() + args.out_rows.offset(row) + first, a, count);
                  });
}

}  // namespace

void linear(const LinearArgs& args) {
  dispatch<bf16, f16, float>(args.x.dtype,
                             [&]<class T>() { is_gate(args.activation) ? linear<2, T>(args) : linear<1, T>(args); });
}

}  // namespace KESTREL_CPU
