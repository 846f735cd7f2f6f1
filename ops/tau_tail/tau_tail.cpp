#include "ops/tau_tail/tau_tail.h"

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/tau_tail/args.h"

KESTREL_CPU_TWIN(tau_tail, void(const kestrel::TauTailArgs& args));

namespace kestrel {
namespace cuda {
void tau_tail(Stream stream, const TauTailArgs& args);
}

void check_tau(Contract& c, const Tensor& tok_qv_lin, const Tensor& tau_pos_table, const Tensor& x, int token_dims,
               int64_t heads) {
  Arg tok = c.in("tok_qv_lin", tok_qv_lin).dtype_like(x).last_contiguous();
  token_dims == 1 ? tok.shape({x.shape[0], 2 * heads}) : tok.shape({x.shape[0], x.shape[1], 2 * heads});
  Dim P("P");
  Arg table = c.in("tau_pos_table", tau_pos_table).dtype({x.dtype, DType::kF32});
  table.shape({P, heads}).last_contiguous();
}

void tau_tail_apply_into(Stream stream, Tensor qkv_out, Tensor tok_qv_lin, Tensor tau_pos_table, Tensor position_ids) {
  Contract c("tau_tail_apply_into");
  c.out("qkv_out", qkv_out).dtype({DType::kBF16, DType::kF16}).rank(2, 3).last_contiguous();
  c.in("tok_qv_lin", tok_qv_lin).rank(qkv_out.rank, qkv_out.rank);
  c.require(tok_qv_lin.size(-1) % 2 == 0, "tok_qv_lin", "two factors a head wide", tok_qv_lin.size(-1));
  const int64_t heads = tok_qv_lin.size(-1) / 2, width = qkv_out.size(-1);
  check_tau(c, tok_qv_lin, tau_pos_table, qkv_out, qkv_out.rank - 1, heads);
  c.require(heads ? width % (3 * heads) == 0 : width == 0, "qkv_out", "a multiple of three times the heads wide",
            width);
  Arg positions = c.in("position_ids", position_ids).dtype({DType::kI64, DType::kI32});
  qkv_out.rank == 2 ? positions.shape({qkv_out.shape[0]}) : positions.shape({qkv_out.shape[0], qkv_out.shape[1]});
  c.indices(stream, "position_ids", position_ids, 0, tau_pos_table.shape[0], false);
  if (qkv_out.empty()) return;
  const TauTailArgs args{qkv_out, tok_qv_lin, tau_pos_table, position_ids, heads, width / (3 * heads)};
  if (c.on_cpu()) return cpu::tau_tail(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(qkv_out.device);
    cuda::tau_tail(stream, args);
  }
}

}  // namespace kestrel
