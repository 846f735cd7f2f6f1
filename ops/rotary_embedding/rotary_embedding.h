// Rotates pairs of query and key elements by their token's angle, in place (RoFormer, Su et al. 2021,
// arXiv:2104.09864): (a, b) <- (a cos - b sin, b cos + a sin), fp32, rounded once.
//   query [T, Hq, D] | [B, S, Hq, D], key the same with heads of its own, bf16 | f16 | f32, any strides but the last
//   positions [T] | [B, S] i64 | i32, in [0, P)     head_size D
//   cos_sin_cache [P, R] f32: R/2 cosines, R/2 sines; R even, R <= D; elements past R stay
//   pair i is (i, i + R/2) (GPT-NeoX), interleaved (2i, 2i + 1) (GPT-J)
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

KESTREL_API void rotary_embedding(Stream stream, Tensor positions, Tensor query, std::optional<Tensor> key,
                                  int64_t head_size, Tensor cos_sin_cache, bool interleaved);

}  // namespace kestrel
