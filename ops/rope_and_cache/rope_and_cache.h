// tau_tail (where tau is given) on q and v, rotary_embedding on q and k, reshape_and_cache_flash of k and v, in one:
// the same bits as the three in this order, intermediate roundings included. q is changed in place, k and v are not.
//   q [T, Hq, D] | [B, S, Hq, D], k, v the same with Hk heads, bf16 | f16, any strides but the last
//   positions [T] | [B, S], cos_sin_cache, interleaved: as rotary_embedding
//   k_cache, v_cache, slot_mapping [T] (B S of them), kv_cache_dtype, scales: as reshape_and_cache_flash
//   tok_qv_lin [T, 2 H] | [B, S, 2 H], tau_pos_table [P, H]: as tau_tail; both or neither, and then Hq = Hk = H
#pragma once

#include <kestrel/tensor.h>

#include <string_view>

namespace kestrel {

KESTREL_API void rope_and_cache(Stream stream, Tensor positions, Tensor q, Tensor k, Tensor v, Tensor cos_sin_cache,
                                Tensor k_cache, Tensor v_cache, Tensor slot_mapping, std::string_view kv_cache_dtype,
                                std::optional<Value<float>> k_scale, std::optional<Value<float>> v_scale,
                                bool interleaved, std::optional<Tensor> tok_qv_lin,
                                std::optional<Tensor> tau_pos_table);

}  // namespace kestrel
