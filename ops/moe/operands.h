// The checks that the ops over experts share.
#pragma once

#include <string>
#include <string_view>

#include "kestrel/contract.h"
#include "ops/moe/moe_args.h"
#include "ops/moe/tile.h"

namespace kestrel {

// The gates as the ops over experts call them. (`linear` has activations besides.)
struct NamedGate {
  std::string_view name;
  Gate value;
};
inline constexpr NamedGate kGates[] = {
    {"gelu_residual", Gate::kGeluResidual}, {"silu_and_mul", Gate::kSilu},          {"silu", Gate::kSilu},
    {"gelu_and_mul", Gate::kGelu},          {"gelu_tanh_and_mul", Gate::kGeluTanh},
};

inline std::optional<Gate> gate_named(Contract& c, std::string_view name, bool may_be_none) {
  if (name.empty() && may_be_none) return std::nullopt;
  for (const NamedGate& g : kGates)
    if (g.name == name) return g.value;
  c.require(false, "activation",
            may_be_none ? "gelu_residual, silu, silu_and_mul, gelu_and_mul, gelu_tanh_and_mul or none"
                        : "gelu_residual, silu, silu_and_mul, gelu_and_mul or gelu_tanh_and_mul",
            name.empty() ? "none" : std::string(name));
  return std::nullopt;
}

// An operand with the names of its parts; a scale for e4m3 alone.
struct Operand {
  const char* name;
  const Tensor& tensor;
  const char* scale_name = nullptr;
  const Tensor* scale = nullptr;
};

inline ExpertWeights check_weights(Contract& c, const Operand& w, const MoeArgs& args, Dim* experts, Dim* rows) {
  Arg arg = c.in(w.name, w.tensor);
  if (w.scale)
    arg.dtype({DType::kE4M3, DType::kU8});
  else
    arg.dtype({args.dtype});
  arg.shape({*experts, *rows, args.depth}).last_contiguous();
  ExpertWeights weights{w.tensor.data, w.tensor.stride[0], w.tensor.stride[1]};
  if (w.scale) {
    c.in(w.scale_name, *w.scale).dtype({DType::kF32}).shape({*experts, *rows}).last_contiguous();
    weights.scale = w.scale->ptr<float>();
    weights.scale_stride = w.scale->stride[0];
  }
  return weights;
}

// Sets args->tile. The other fields are checked before.
inline void check_tile(Contract& c, int64_t tile, const MoeLayerSizes& sizes, bool down, MoeArgs* args) {
  if (tile < 0) {
    args->tile = moe_tile_for(sizes, args->tokens, args->block_m, down);
    return;
  }
  c.require(tile < moe_tile_count(), "tile", "below the number of compiled tiles", tile);
  c.require(moe_tile(tile).takes(args->dtype), "tile", "one of this dtype's", tile);
  c.require(moe_tile(tile).block_m == args->block_m, "block_m", "as high as the tile", args->block_m);
  args->tile = static_cast<int>(tile);
}

}  // namespace kestrel
