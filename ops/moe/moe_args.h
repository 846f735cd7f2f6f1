// What both devices work on, after the checks.
#pragma once

#include <kestrel/tensor.h>

#include "ops/activation/gate.h"

namespace kestrel {

// A matrix [out, depth] for each expert, with a scale for each output channel where the elements are e4m3.
struct ExpertWeights {
  const void* data = nullptr;
  int64_t expert_stride = 0, row_stride = 0;  // in elements
  const float* scale = nullptr;
  int64_t scale_stride = 0;  // between experts
};

// The rows of every expert from `row` on: the second half of two that stand in one tensor, or a chunk.
inline ExpertWeights from_row(ExpertWeights weights, int64_t row, DType dtype) {
  weights.data = static_cast<const char*>(weights.data) + row * weights.row_stride * size_of(dtype);
  if (weights.scale) weights.scale += row;
  return weights;
}

struct MoeArgs {
  DType dtype{};  // of x and the weights: bf16, f16 or e4m3
  Tensor out;     // rows: assignments; with reduce: tokens. Of e4m3 bf16, or f32 for up
  Rows out_rows;
  const void* x = nullptr;
  Rows x_rows;
  const float* x_scale = nullptr;  // one for each row
  int64_t slots_per_row = 1;       // assignments that read the same row of x: K for up, 1 for down
  int panels = 1;                  // 2 for up
  ExpertWeights panel[2];
  std::optional<Gate> gate;
  const float* topk_weights = nullptr;  // down
  int64_t topk_weights_stride = 0;
  bool reduce = false;
  std::optional<Tensor> workspace;

  int64_t tokens = 0, slots = 0, experts = 0;
  int64_t width = 0;  // columns of a panel
  int64_t depth = 0;

  const int32_t* sorted_token_ids = nullptr;
  const int32_t* expert_ids = nullptr;
  const int32_t* num_tokens_post_pad = nullptr;
  int64_t positions = 0;  // the most that num_tokens_post_pad may say
  int64_t block_m = 1;
  int tile = -1;  // moe_tile(), as high as block_m; -1: the kernels choose

  // Of fused_moe: the routing. At few tokens moe_warp makes its own lists of it: sorted_token_ids is null then.
  const int32_t* ids = nullptr;
  int64_t ids_stride = 0;
  const int32_t* expert_map = nullptr;
  int64_t routed = 0;                  // experts that ids name
  bool settled = false;                // ids, or the alignment, are older than the preceding kernel
  DType parts = DType::kF32;           // what wgmma kernels round to before they sum; another only with ids
  std::optional<DType> quantize_from;  // with weights of e4m3 and no x_scale: what x is in, and up quantizes

  int64_t assignments() const { return tokens * slots; }
};

}  // namespace kestrel
