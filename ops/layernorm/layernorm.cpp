#include "ops/layernorm/layernorm.h"

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/layernorm/args.h"

KESTREL_CPU_TWIN(layernorm, void(const kestrel::LayernormArgs& args));

namespace kestrel {
namespace cuda {
void layernorm(Stream stream, const LayernormArgs& args);
}

namespace {

void layernorm(const char* op, bool reload, Stream stream, Tensor out, Tensor x, Tensor weight, Tensor bias,
               float eps) {
  Contract c(op);
  Dim N("N");
  LayernormArgs args{out, x, weight, bias, {}, {}, 0, eps, reload};
  c.in("x", x).dtype({DType::kBF16, DType::kF16}).last(N).rows(&args.x_rows);
  c.require(N <= 65536, "x", "at most 65536 wide", N.size);
  c.in("weight", weight).dtype_like(x).shape({N}).last_contiguous();
  c.in("bias", bias).dtype_like(x).shape({N}).last_contiguous();
  c.out("out", out).like(x).rows(&args.out_rows);
  c.require(eps >= 0, "eps", "zero or more", eps);
  args.width = N;
  if (out.empty()) return;
  if (c.on_cpu()) return cpu::layernorm(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(x.device);
    cuda::layernorm(stream, args);
  }
}

}  // namespace

void layernorm(Stream stream, Tensor out, Tensor x, Tensor weight, Tensor bias, float eps) {
  layernorm("layernorm", false, stream, out, x, weight, bias, eps);
}

void layernorm_reload(Stream stream, Tensor out, Tensor x, Tensor weight, Tensor bias, float eps) {
  layernorm("layernorm_reload", true, stream, out, x, weight, bias, eps);
}

}  // namespace kestrel
