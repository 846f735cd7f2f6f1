// What tau_tail works on, and the part of its contract that other ops which scale share.
#pragma once

#include "kestrel/contract.h"
#include "kestrel/tokens.h"

namespace kestrel {

struct TauTailArgs {
  Tensor qkv_out, tok_qv_lin, tau_pos_table, position_ids;
  int64_t heads, head_size;
};

// tok_qv_lin and tau_pos_table for the tokens and the dtype of x, which is [T, ...] or [B, S, ...].
void check_tau(Contract& c, const Tensor& tok_qv_lin, const Tensor& tau_pos_table, const Tensor& x, int token_dims,
               int64_t heads);

}  // namespace kestrel
