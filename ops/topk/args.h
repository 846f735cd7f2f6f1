#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

inline constexpr int64_t kMaxChosen = 128;  // k

struct TopkArgs {
  Tensor values, indices, scores;
  Rows values_rows, indices_rows, scores_rows;
  int64_t width, k;
  bool softmax;
};

struct RouterArgs {
  Tensor weights, ids, scores;
  std::optional<Tensor> bias;
  Rows weights_rows, ids_rows, scores_rows;
  int64_t experts, k;
  bool sigmoid, renormalize;
  int64_t groups, chosen_groups;
  float scale;
};

struct SampleArgs {
  Tensor ids, logits;
  Rows logits_rows;
  int64_t width, k;
  Value<float> temperature;
  Value<int64_t> seed, offset;
};

}  // namespace kestrel
