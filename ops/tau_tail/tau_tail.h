// Scales the query and value heads of a packed projection in place, by token and position:
//   q_h *= tanh(tok[h]) + tau[position, h]     v_h *= tanh(tok[H + h]) + tau[position, h]
// in fp32, rounded once; keys stay.
//   qkv_out [B, S, 3 H D] | [T, 3 H D] bf16 | f16: H D of queries, of keys, of values
//   tok_qv_lin [B, S, 2 H] | [T, 2 H] as qkv_out      position_ids [B, S] | [T] i64 | i32, in [0, P)
//   tau_pos_table [P, H] as qkv_out, or f32           rows of any stride
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

KESTREL_API void tau_tail_apply_into(Stream stream, Tensor qkv_out, Tensor tok_qv_lin, Tensor tau_pos_table,
                                     Tensor position_ids);

}  // namespace kestrel
