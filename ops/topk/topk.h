// The k best of each row, routing on them, and drawing a token from them. The order of scores is the same in all three:
// largest first; equal scores (-0.0 equals 0.0): lower index first; NaN counts as largest. 1 <= k <= 128, k <= N <
// 2^31.
#pragma once

#include <kestrel/tensor.h>

#include <string_view>

namespace kestrel {

// values, indices: the k best of each row, k being their last dimension. With softmax, values are the softmax over
// those k, in fp32, rounded once; without, they are the scores bit for bit.
//   scores [T, N] bf16 | f16 | f32     values [T, k] as scores     indices [T, k] i32     rows of any stride
KESTREL_API void topk_fwd(Stream stream, Tensor values, Tensor indices, Tensor scores, bool softmax);

// Mixture-of-experts routing. s = softmax or sigmoid of a row, over all experts, in fp32; the k experts of largest
// s + bias are chosen, in that order; the weights are their s, without the bias. renormalize divides them by their sum
// (where that is 0 they stay 0), and scale multiplies them last.
// With num_groups > 1 the E experts are that many groups of neighbours; a group scores the sum of its two largest
// s + bias, and experts are chosen from the topk_groups best groups alone (DeepSeek-V3, 2024, arXiv:2412.19437).
//   scores [T, E] bf16 | f16 | f32     bias [E] bf16 | f16 | f32     weights [T, k] f32     ids [T, k] i32
// scoring "softmax" | "sigmoid"; num_groups divides E, and k <= topk_groups * E / num_groups.
KESTREL_API void topk_router(Stream stream, Tensor weights, Tensor ids, Tensor scores, std::string_view scoring,
                             std::optional<Tensor> bias, bool renormalize, int64_t num_groups, int64_t topk_groups,
                             float scale);

// One token for each row, drawn from softmax(the k best logits / temperature); temperature 0: the best.
//   logits [T, N] bf16 | f16 | f32     ids [T] i32     temperature f32 >= 0     seed, offset i64
// The draw of row r depends on that row, seed and offset + r alone: a caller that draws again adds T to offset. To the
// bit, on every device, all in fp32 with each operation rounded by itself (no fused multiply-add):
//   u     Philox4x32-10 (Salmon et al. 2011) with key = the low and high half of seed and counter = the low and high
//         half of offset + r (modulo 2^64), 0, 0; u = (its first word >> 8) * 2^-24, in [0, 1)
//   w[i]  exp((l[i] - l[0]) / temperature) by exp_weight() of draw.h, for l[0] >= l[1] >= ... the k best logits in
//         order
//   c[i]  c[i-1] + w[i], added in that order
//   id    that of the first i with c[i] > u * c[k-1]; where there is none (a NaN or an infinite best logit), of i = 0.
// On a device a temperature that is not above 0 gives the best, too.
KESTREL_API void sample_top_k(Stream stream, Tensor ids, Tensor logits, int64_t k, Value<float> temperature,
                              Value<int64_t> seed, Value<int64_t> offset);

}  // namespace kestrel
