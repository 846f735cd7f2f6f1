#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/parallel.h"
#include "ops/activation/gate_cpu.h"

namespace KESTREL_CPU {
namespace {

template <class T, Gate kGate>
void apply_row(T* __restrict out, const T* __restrict a, const T* __restrict b, int64_t width) {
  for (int64_t i = 0; i < width; ++i) out[i] = from_float<T>(apply_gate<kGate>(to_float(a[i]), to_float(b[i])));
}

}  // namespace

void activation(const ActivationArgs& args) {
  dispatch<bf16, f16, float>(args.x.dtype, [&]<class T>() {
    dispatch_gate(args.gate, [&]<Gate kGate>() {
      const int64_t grain = 1 + 16384 / args.width;
      parallel_for(args.out_rows.count, grain, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
          const T* a = args.x.ptr<T>() + args.x_rows.offset(row);
          apply_row<T, kGate>(args.out.ptr<T>() + args.out_rows.offset(row), a, a + args.width, args.width);
        }
      });
    });
  });
}

}  // namespace KESTREL_CPU
