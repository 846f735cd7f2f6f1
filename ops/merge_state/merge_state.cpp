#include "ops/merge_state/merge_state.h"

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/merge_state/states.h"

KESTREL_CPU_TWIN(merge_state, void(const kestrel::MergeStateArgs& args));

namespace kestrel {
namespace cuda {
void merge_state(Stream stream, const MergeStateArgs& args);
}

namespace {

State rows_of(const Tensor& t) {
  if (t.rank == 4) return {t.data, t.stride[0], t.stride[1], t.stride[2]};
  return {t.data, 0, t.stride[0], t.stride[1]};
}

State lse_of(const Tensor& t) {
  if (t.rank == 3) return {t.data, t.stride[0], t.stride[2], t.stride[1]};
  return {t.data, 0, t.stride[1], t.stride[0]};
}

}  // namespace

void merge_state(Stream stream, Tensor out, Tensor lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  Contract c("merge_state");
  c.in("out_a", out_a).dtype({DType::kBF16, DType::kF16, DType::kF32}).rank(3, 4).last_contiguous();
  const bool packed = out_a.rank == 3;
  const int64_t batch = packed ? 1 : out_a.shape[0], tokens = out_a.shape[packed ? 0 : 1], heads = out_a.size(-2);
  c.in("lse_a", lse_a).dtype({DType::kF32});
  packed ? c.in("lse_a", lse_a).shape({heads, tokens}) : c.in("lse_a", lse_a).shape({batch, heads, tokens});
  c.in("out_b", out_b).like(out_a).last_contiguous();
  c.in("lse_b", lse_b).like(lse_a);
  c.out("out", out).like(out_a).last_contiguous();
  c.out("lse", lse).like(lse_a);
  if (lse.empty()) return;
  const MergeStateArgs args{out_a.dtype,    batch,          tokens,      heads,         out_a.size(-1), rows_of(out),
                            rows_of(out_a), rows_of(out_b), lse_of(lse), lse_of(lse_a), lse_of(lse_b)};
  if (c.on_cpu()) return cpu::merge_state(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(out_a.device);
    cuda::merge_state(stream, args);
  }
}

}  // namespace kestrel
