// out = softmax(mask(softcap(q k^T * softmax_scale))) v, fp32 inside, rounded once. Query head h reads key head
// h / (Hq / Hk). lse, where given, is the natural log of the softmax's denominator. A query that sees no key gives
// zeros and -inf (with a sink: the sink). Packed rows of no sequence are neither read nor written.
//   q, out [B, Sq, Hq, D], or packed [total_q, Hq, D] with cu_seqlens_q      bf16 | f16, 1 <= D <= 256
//   k, v   [B, Sk, Hk, D], or packed [total_k, Hk, D] with cu_seqlens_k,     as q | e4m3 (also as uint8 bits)
//          or [pages, page_size, Hk, D] with page_table                      any strides, last dim contiguous
//   lse    [B, Hq, Sq], packed [Hq, total_q]                                 f32, any strides
// out and lse overlap no input. A sequence's bits do not depend on the number of threads, nor, on the CPU and with
// batch_invariant, on the other sequences.
// FlashAttentionFwd rounds softmax's weights to q's type (e4m3 keys: f16); where a value is NaN or Inf, it reaches
// queries that do not see it, too, if they are among 64 of which one sees a key among the 64 around it.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

struct AttentionOptions {
  // Lengths, int32. Query i of a sequence stands at position i + len_k - len_q (aligned to the bottom right).
  std::optional<Tensor> cu_seqlens_q = {}, cu_seqlens_k = {};   // [B + 1], where each sequence begins
  std::optional<int64_t> max_seqlen_q = {}, max_seqlen_k = {};  // the host's bounds on the lengths
  std::optional<Tensor> seqused_k = {};                         // [B], keys in use; without it all there is room for
  std::optional<Tensor> page_table = {};  // [B, max_pages]; entries that no query needs are never read

  bool causal = false;  // position p sees keys <= p
  // A number or int32 [B]: causal, but positions below it see one another both ways.
  std::optional<Value<int64_t>> prefix_len = {};
  std::optional<int64_t> window_left = {}, window_right = {};  // keys in [p - left, p + right] alone; -1: no limit

  std::optional<float> softmax_scale = {};      // 1 / sqrt(D)
  float softcap = 0.0f;                         // c > 0: scores become c tanh(score / c)
  std::optional<Tensor> learnable_sink = {};    // [Hq] bf16 | f16 | f32: a score that takes its share and has no value
  Value<float> k_scale = 1.0f, v_scale = 1.0f;  // true value = stored * scale

  // Hints to the kernels of the GPU; on the CPU every result is batch invariant.
  int64_t num_splits = 0;  // 0: chosen by the library
  // Only the newest so many keys may still be being written by the kernel before, which then must not be one that lets
  // its successor start before its own wait (norms, linear, MoE).
  std::optional<int64_t> fresh_tokens = {};
  bool batch_invariant = false;
  std::optional<Tensor> workspace = {};  // for CUDA, u8, attention_workspace_bytes() or more at a multiple of 16, with
                                         // anything in it; without one, keys are not split over many blocks

  struct {
    const char* op = "attention";
    const char* k = "k";
    const char* v = "v";
  } names = {};  // in error messages
};

KESTREL_API void attention(Stream stream, Tensor out, std::optional<Tensor> lse, Tensor q, Tensor k, Tensor v,
                           const AttentionOptions& options);

KESTREL_API int64_t attention_workspace_bytes();  // the same for every call

// The kernel that this thread's latest attention() ran: "cpu"; on CUDA "FlashAttentionPlain" or, for many queries,
// "FlashAttentionFwd" or, for few, "FlashAttentionDecodeSm90" or "FlashAttentionDecodeSm90PersistentSplitFused" (keys
// split, parts joined); "" before the first.
KESTREL_API const char* last_attention_kernel();

}  // namespace kestrel
