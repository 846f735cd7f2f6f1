#include "ops/rope_and_cache/rope_and_cache.h"

#include <algorithm>

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/rope_and_cache/args.h"
#include "ops/tau_tail/args.h"

KESTREL_CPU_TWIN(rope_and_cache, void(const kestrel::RopeAndCacheArgs& args));

namespace kestrel {
namespace cuda {
void rope_and_cache(Stream stream, const RopeAndCacheArgs& args);
}

void rope_and_cache(Stream stream, Tensor positions, Tensor q, Tensor k, Tensor v, Tensor cos_sin_cache, Tensor k_cache,
                    Tensor v_cache, Tensor slot_mapping, std::string_view kv_cache_dtype,
                    std::optional<Value<float>> k_scale, std::optional<Value<float>> v_scale, bool interleaved,
                    std::optional<Tensor> tok_qv_lin, std::optional<Tensor> tau_pos_table) {
  Contract c("rope_and_cache");
  RopeAndCacheArgs args{{positions, q, k, cos_sin_cache, interleaved}, {}, tok_qv_lin, tau_pos_table};
  c.out("q", q).dtype({DType::kBF16, DType::kF16});
  check_rotary(c, "q", args.rotary);
  Dim key_heads("Hk");
  check_heads(c.in("k", k), q, key_heads);
  check_heads(c.in("v", v), q, key_heads);
  args.write = {k,         v,          k_cache, v_cache, slot_mapping, {}, {}, false, token_rows(q, 2).count,
                key_heads, q.size(-1), 0,       0};
  check_kv_cache(c, &args.write, kv_cache_dtype, k_scale, v_scale, "k_cache", "v_cache");
  int64_t table = cos_sin_cache.shape[0];
  c.require(tok_qv_lin.has_value() == tau_pos_table.has_value(), "tok_qv_lin and tau_pos_table",
            "given both or neither", std::string("one"));
  if (tok_qv_lin) {
    c.require(q.size(-2) == key_heads, "k", "of as many heads as q where tau is given", key_heads.size);
    check_tau(c, *tok_qv_lin, *tau_pos_table, q, q.rank - 2, key_heads);
    table = std::min(table, tau_pos_table->shape[0]);
  }
  c.indices(stream, "positions", positions, 0, table, false);
  check_slots(c, stream, args.write);
  if (c.on_cpu()) return cpu::rope_and_cache(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(q.device);
    cuda::rope_and_cache(stream, args);
  }
}

}  // namespace kestrel
