#include "ops/rmsnorm/rmsnorm.h"

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/rmsnorm/args.h"

KESTREL_CPU_TWIN(rmsnorm, void(const kestrel::RmsnormArgs& args));

namespace kestrel {
namespace cuda {
void rmsnorm(Stream stream, const RmsnormArgs& args);
}

void rmsnorm(Stream stream, Tensor out, Tensor x, Tensor weight, float eps, std::optional<Tensor> residual) {
  Contract c("rmsnorm");
  Dim N("N");
  RmsnormArgs args{out, x, weight, residual, {}, {}, {}, 0, eps};
  c.in("x", x).dtype({DType::kBF16, DType::kF16, DType::kF32}).last(N).rows(&args.x_rows);
  c.require(N <= 65536, "x", "at most 65536 wide", N.size);
  c.in("weight", weight).dtype_like(x).shape({N}).last_contiguous();
  c.out("out", out).like(x).rows(&args.out_rows);
  if (residual) c.out("residual", *residual).like(x).rows(&args.residual_rows);
  c.require(eps >= 0, "eps", "zero or more", eps);
  args.width = N;
  if (out.empty()) return;
  if (c.on_cpu()) return cpu::rmsnorm(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(x.device);
    cuda::rmsnorm(stream, args);
  }
}

}  // namespace kestrel
