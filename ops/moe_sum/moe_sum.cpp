#include "ops/moe_sum/moe_sum.h"

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"

KESTREL_CPU_TWIN(moe_sum, void(const kestrel::Tensor& out, const kestrel::Tensor& x));

namespace kestrel {
namespace cuda {
void moe_sum(Stream stream, const Tensor& out, const Tensor& x);
}

void moe_sum(Stream stream, Tensor out, Tensor x) {
  Contract c("moe_sum");
  Dim T("T"), K("K"), N("N");
  c.in("x", x).dtype({DType::kBF16, DType::kF16, DType::kF32}).shape({T, K, N}).last_contiguous();
  c.out("out", out).dtype_like(x).shape({T, N}).last_contiguous();
  if (out.empty()) return;
  if (c.on_cpu()) return cpu::moe_sum(out, x);
  if constexpr (kHasCuda) {
    DeviceGuard guard(x.device);
    cuda::moe_sum(stream, out, x);
  }
}

}  // namespace kestrel
