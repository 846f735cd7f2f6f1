#include "kestrel/ffi.h"
#include "ops/attention/attention.h"

namespace kestrel {
namespace {

// The three Python functions are one: they differ in the names that errors carry.
enum class Face { kFunc, kVarlen, kKvCache };

template <Face kFace>
void flat(Stream stream, Tensor out, std::optional<Tensor> lse, std::optional<Tensor> workspace, Tensor q, Tensor k,
          Tensor v, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
          std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k, std::optional<Tensor> seqused_k,
          std::optional<Tensor> page_table, bool causal, std::optional<Value<int64_t>> prefix_len,
          std::optional<int64_t> window_left, std::optional<int64_t> window_right, std::optional<float> softmax_scale,
          float softcap, std::optional<Tensor> learnable_sink, std::optional<Value<float>> k_scale,
          std::optional<Value<float>> v_scale, int64_t num_splits, std::optional<int64_t> fresh_tokens,
          bool batch_invariant) {
  AttentionOptions options{cu_seqlens_q,
                           cu_seqlens_k,
                           max_seqlen_q,
                           max_seqlen_k,
                           seqused_k,
                           page_table,
                           causal,
                           prefix_len,
                           window_left,
                           window_right,
                           softmax_scale,
                           softcap,
                           learnable_sink,
                           k_scale.value_or(1.0f),
                           v_scale.value_or(1.0f),
                           num_splits,
                           fresh_tokens,
                           batch_invariant,
                           workspace};
  if (kFace == Face::kFunc) options.names.op = "flash_attn_func";
  if (kFace == Face::kVarlen) options.names.op = "flash_attn_varlen_func";
  if (kFace == Face::kKvCache) options.names = {"flash_attn_with_kvcache", "k_cache", "v_cache"};
  attention(stream, out, lse, q, k, v, options);
}

}  // namespace
}  // namespace kestrel

KESTREL_EXPORT_AS(flash_attn_func, flat<kestrel::Face::kFunc>);
KESTREL_EXPORT_AS(flash_attn_varlen_func, flat<kestrel::Face::kVarlen>);
KESTREL_EXPORT_AS(flash_attn_with_kvcache, flat<kestrel::Face::kKvCache>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_workspace_bytes, kestrel::attention_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(last_attention_kernel, [] { return tvm::ffi::String(kestrel::last_attention_kernel()); });
