// What rope_and_cache works on: the arguments of the ops that it joins.
#pragma once

#include "ops/kv_cache_write/args.h"
#include "ops/rotary_embedding/args.h"

namespace kestrel {

struct RopeAndCacheArgs {
  RotaryArgs rotary;       // q, k
  KvCacheWriteArgs write;  // k, v as given, of rank 3 or 4: their tokens by token_rows
  std::optional<Tensor> tok_qv_lin, tau_pos_table;
};

}  // namespace kestrel
