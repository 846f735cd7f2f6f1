#include "ops/activation/activation.h"

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/activation/gate.h"

KESTREL_CPU_TWIN(activation, void(const kestrel::ActivationArgs& args));

namespace kestrel {
namespace cuda {
void activation(Stream stream, const ActivationArgs& args);
}

namespace {

void activation(const char* op, Gate gate, Stream stream, Tensor out, Tensor x) {
  Contract c(op);
  ActivationArgs args{gate, out, x, {}, {}, 0};
  c.in("x", x).dtype({DType::kBF16, DType::kF16, DType::kF32}).rank(1, kMaxRank).rows(&args.x_rows);
  c.require(x.size(-1) % 2 == 0, "x", "two halves wide: an even last dimension", x.size(-1));
  args.width = x.size(-1) / 2;
  Tensor half = x;
  half.shape[x.rank - 1] = args.width;
  c.out("out", out).like(half).rows(&args.out_rows);
  if (out.empty()) return;
  if (c.on_cpu()) return cpu::activation(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(x.device);
    cuda::activation(stream, args);
  }
}

}  // namespace

void gelu_residual(Stream s, Tensor out, Tensor x) { activation("gelu_residual", Gate::kGeluResidual, s, out, x); }
void silu_and_mul(Stream s, Tensor out, Tensor x) { activation("silu_and_mul", Gate::kSilu, s, out, x); }
void gelu_and_mul(Stream s, Tensor out, Tensor x) { activation("gelu_and_mul", Gate::kGelu, s, out, x); }
void gelu_tanh_and_mul(Stream s, Tensor out, Tensor x) { activation("gelu_tanh_and_mul", Gate::kGeluTanh, s, out, x); }

}  // namespace kestrel
