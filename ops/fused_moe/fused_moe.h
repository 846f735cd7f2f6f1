// A layer of experts in one call: out[t] = sum over k of topk_weights[t, k] down(gate(up(x[t]))), with the weights of
// expert topk_ids[t, k]. Alignment (ops/moe_align), both products (ops/moe) with the gate in the first one's epilogue,
// the sum in order: all in fp32, rounded between the products (to the dtype of x) and at the end. The wgmma kernels, at
// many tokens on CUDA, round what is summed as well: each assignment's row as moe_down without reduce returns it.
//   x [T, H]   w_up [E, 2I, H]: what the gate bends, then what it multiplies by   w_down [E, H, I]   out [T, H]
//   bf16 | f16, all alike. With scales: weights e4m3 (or bits as u8), a scale for each output channel, w_up_scale
//   [E, 2I], w_down_scale [E, H] f32; x bf16 | f16 and the gated values, in fp32, are quantized as fp8_quant_row does
//   it, for each token and for each assignment; out bf16.
//   topk_weights [T, K] f32   topk_ids [T, K] i32: those outside the experts add nothing
//   expert_map [G] i32, or none or empty (G = E): topk_ids' experts as the weights have them; negative: adds nothing
// G from 1 to 1024, other sizes any, zero too; T * K padded to blocks of block_m below 2^31. Leading dimensions
// strided. out overlaps nothing else. The bits of a token depend on nothing but its own row, weights and experts, and
// on the kernels. block_m, tile: as in ops/moe, of both products.
// workspace: u8, fused_moe_workspace_bytes() long, at a multiple of 16, of any contents; on the CPU none will do.
#pragma once

#include <kestrel/tensor.h>

#include <string_view>

namespace kestrel {

// experts: G
KESTREL_API int64_t fused_moe_workspace_bytes(int64_t tokens, int64_t slots, int64_t experts, int64_t hidden,
                                              int64_t inner, int64_t block_m, bool fp8);

KESTREL_API void fused_moe(Stream stream, Tensor out, std::optional<Tensor> workspace, Tensor x, Tensor w_up,
                           std::optional<Tensor> w_up_scale, Tensor w_down, std::optional<Tensor> w_down_scale,
                           Tensor topk_weights, Tensor topk_ids, std::optional<Tensor> expert_map, int64_t block_m,
                           int64_t tile, std::string_view activation);

}  // namespace kestrel
