// What rotary_embedding works on, and the part of its contract that other ops which rotate share.
#pragma once

#include "kestrel/contract.h"
#include "kestrel/tokens.h"

namespace kestrel {

struct RotaryArgs {
  Tensor positions, query;
  std::optional<Tensor> key;
  Tensor cos_sin_cache;
  bool interleaved;
};

// Checks all but the key and the values of positions.
void check_rotary(Contract& c, const char* query_name, const RotaryArgs& args);
// One more tensor of heads for the same tokens: shape of query, but for the heads.
void check_heads(Arg arg, const Tensor& query, Dim& heads);

}  // namespace kestrel
