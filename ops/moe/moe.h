// The two products of a layer of experts, over assignments (token * K + slot) grouped by expert (ops/moe_align):
//   up    out[t, k] = x[t] [w1; w2]^T                 or, with a gate (ops/activation), gate(x[t] w1^T, x[t] w2^T)
//   down  out[t, k] = topk_weights[t, k] x[t, k] w3^T or, with reduce, the sum over k = 0 .. K-1: out [T, H]
// w1, w2 are those of the assignment's expert. Sums, scales, gate, routing weight and reduction in fp32, one rounding.
//   hidden_states [T, H]   w1 [E, I, H], w2 [E, I, H]; or w1 [E, 2I, H] and no w2   out [T, K, 2I], gated [T, K, I]
//   moe_out [T, K, I] or [T*K, I]   w3 [E, H, I]   out [T, K, H]; without reduce, for both, [T*K, .] will do
//   bf16 | f16, all alike. fp8: e4m3 (or its bits as u8) with fp32 scales, a row's [T] or [T, K] (any shape of as many)
//   and an output channel's [E, I], [E, 2I], [E, H]; out bf16.
//   topk_weights [T, K] f32   topk_ids [T, K] i32 or none: checked, not read
//   sorted_token_ids [S], expert_ids [blocks], num_tokens_post_pad [1] i32: block b of block_m entries belongs to
//   expert expert_ids[b]; entries from num_tokens_post_pad on are not looked at; T*K is padding; an expert below 0 is
//   none.
// Any sizes, zero too; leading dimensions strided. Rows of out whose assignment is nowhere in the list are not written,
// and add nothing where summed. out overlaps nothing else. An assignment's bits depend on nothing but its own row
// and the kernel: on CUDA up to 64 tokens have their own (warp.cu says which).
// tile: of those the kernels are compiled in, one that is block_m high, as moe_choice() names it; -1: chosen for this
// block_m, which may be any. Other shapes than a tile takes run on a plain kernel.
// workspace: for down with reduce on CUDA, u8, at a multiple of 16: moe_down_workspace_bytes() or any size that holds
// 4 bytes for each assignment; smaller ones take more launches.
#pragma once

#include <kestrel/tensor.h>

#include <string_view>

namespace kestrel {

// The tiles that serve both products best, by the files of tuned shapes or else a rule, and the block to align for.
struct MoeChoice {
  int64_t block_m, up, down;
};
KESTREL_API MoeChoice moe_choice(int64_t tokens, int64_t experts, int64_t hidden, int64_t inner, DType dtype);

KESTREL_API void moe_up(Stream stream, Tensor out, Tensor hidden_states, Tensor w1, std::optional<Tensor> w2,
                        Tensor topk_weights, std::optional<Tensor> topk_ids, Tensor sorted_token_ids, Tensor expert_ids,
                        Tensor num_tokens_post_pad, int64_t block_m, int64_t tile, std::string_view activation);

KESTREL_API void moe_up_fp8(Stream stream, Tensor out, Tensor hidden, Tensor hidden_scale, Tensor w1, Tensor w1_scale,
                            std::optional<Tensor> w2, std::optional<Tensor> w2_scale, Tensor topk_weights,
                            std::optional<Tensor> topk_ids, Tensor sorted_token_ids, Tensor expert_ids,
                            Tensor num_tokens_post_pad, int64_t block_m, int64_t tile, std::string_view activation);

KESTREL_API int64_t moe_down_workspace_bytes(int64_t tokens, int64_t slots, int64_t hidden);

KESTREL_API void moe_down(Stream stream, Tensor out, std::optional<Tensor> workspace, Tensor moe_out, Tensor w3,
                          Tensor topk_weights, std::optional<Tensor> topk_ids, Tensor sorted_token_ids,
                          Tensor expert_ids, Tensor num_tokens_post_pad, int64_t block_m, int64_t tile, bool reduce);

KESTREL_API void moe_down_fp8(Stream stream, Tensor out, std::optional<Tensor> workspace, Tensor moe_out,
                              Tensor moe_out_scale, Tensor w3, Tensor w3_scale, Tensor topk_weights,
                              std::optional<Tensor> topk_ids, Tensor sorted_token_ids, Tensor expert_ids,
                              Tensor num_tokens_post_pad, int64_t block_m, int64_t tile, bool reduce);

}  // namespace kestrel
