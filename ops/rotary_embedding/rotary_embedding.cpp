#include "ops/rotary_embedding/rotary_embedding.h"

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/rotary_embedding/args.h"

KESTREL_CPU_TWIN(rotary_embedding, void(const kestrel::RotaryArgs& args));

namespace kestrel {
namespace cuda {
void rotary_embedding(Stream stream, const RotaryArgs& args);
}

void check_rotary(Contract& c, const char* query_name, const RotaryArgs& args) {
  const Tensor& query = args.query;
  c.out(query_name, query).rank(3, 4).last_contiguous();
  Arg positions = c.in("positions", args.positions).dtype({DType::kI64, DType::kI32});
  query.rank == 3 ? positions.shape({query.shape[0]}) : positions.shape({query.shape[0], query.shape[1]});
  Dim P("P"), R("R");
  c.in("cos_sin_cache", args.cos_sin_cache).dtype({DType::kF32}).shape({P, R}).last_contiguous();
  c.require(R % 2 == 0 && R <= query.size(-1), "cos_sin_cache", "of an even width, no wider than a head", R.size);
}

void check_heads(Arg arg, const Tensor& query, Dim& heads) {
  arg.dtype_like(query).last_contiguous();
  query.rank == 3 ? arg.shape({query.shape[0], heads, query.shape[2]})
                  : arg.shape({query.shape[0], query.shape[1], heads, query.shape[3]});
}

void rotary_embedding(Stream stream, Tensor positions, Tensor query, std::optional<Tensor> key, int64_t head_size,
                      Tensor cos_sin_cache, bool interleaved) {
  Contract c("rotary_embedding");
  const RotaryArgs args{positions, query, key, cos_sin_cache, interleaved};
  c.out("query", query).dtype({DType::kBF16, DType::kF16, DType::kF32});
  check_rotary(c, "query", args);
  Dim key_heads("Hk");
  if (key) check_heads(c.out("key", *key), query, key_heads);
  c.require(head_size == query.size(-1), "head_size", "the last dimension of query", head_size);
  c.indices(stream, "positions", positions, 0, cos_sin_cache.shape[0], false);
  if (c.on_cpu()) return cpu::rotary_embedding(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(query.device);
    cuda::rotary_embedding(stream, args);
  }
}

}  // namespace kestrel
