// Sorts routed tokens by expert for grouped products: the T * K assignments (token * K + slot) of topk_ids, ascending
// inside each expert's group, groups in the order of expert ids, each padded to a multiple of block_size with the
// sentinel T * K. expert_ids[b] is the expert of block b, num_tokens_post_pad[0] the padded total; what lies behind the
// last group is sentinel in sorted_token_ids and 0 in expert_ids. Ids outside [0, E) are left out.
//   topk_ids [T, K] i32, rows of any stride, T * K < 2^31     E = num_experts, from 1 to 1024     block_size >= 1
//   sorted_token_ids i32 [T * K + min(T * K, E) * (block_size - 1)] or more
//   expert_ids i32, a place for each whole block of that     num_tokens_post_pad [1] i32, or i64 (for 2^31 and above)
//   expert_map [E] i32 (none or empty: all experts are local): the id written to expert_ids; negative: left out
// workspace: for CUDA u8 [moe_align_workspace_bytes()] or more, at a multiple of 4, free again for the next call on the
// stream. None where that is 0.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

KESTREL_API int64_t moe_align_workspace_bytes(int64_t assignments, int64_t num_experts, int64_t max_loras = 1);

KESTREL_API void moe_align_block_size(Stream stream, Tensor sorted_token_ids, Tensor expert_ids,
                                      Tensor num_tokens_post_pad, std::optional<Tensor> workspace, Tensor topk_ids,
                                      int64_t num_experts, int64_t block_size, std::optional<Tensor> expert_map);

// The same once for each LoRA, over the tokens mapped to it: outputs have a leading [max_loras] of any stride.
//   token_lora_mapping [T] i32, below max_loras, negative: none
KESTREL_API void moe_lora_align_block_size(Stream stream, Tensor sorted_token_ids, Tensor expert_ids,
                                           Tensor num_tokens_post_pad, std::optional<Tensor> workspace, Tensor topk_ids,
                                           Tensor token_lora_mapping, int64_t num_experts, int64_t block_size,
                                           std::optional<Tensor> expert_map);

}  // namespace kestrel
