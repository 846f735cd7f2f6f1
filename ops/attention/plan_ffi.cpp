// Plans for Python to show: those of contiguous tensors at addresses that suit every kernel.
#include <string_view>

#include "kestrel/ffi.h"
#include "ops/attention/plan.h"

namespace {

using namespace kestrel;
namespace ffi = tvm::ffi;
using Map = ffi::Map<ffi::String, ffi::Any>;

template <class T, size_t kSize>
ffi::String word(T value, const char* const (&words)[kSize]) {
  return words[static_cast<int>(value)];
}

Map decode_map(const DecodePlan& plan, const AttentionProblem& p, int64_t most_keys) {
  const DecodeRow& tile = decode_row(plan.tile);
  const int64_t rows = p.q_heads / p.k_heads * p.q_len, groups = decode_groups(tile, p.k_heads, rows);
  // As launch_decode() has it, of a call without softcap, sink and lse.
  const bool simple = tile.whole && p.q_len == 1 && rows <= 8 && p.window_left < 0 && p.window_right < 0;
  return Map{{"kernel", ffi::String(plan.kernel())},
             {"tile", plan.tile},
             {"simple", simple},
             {"size", tile.size},
             {"whole", tile.whole},
             {"heads", tile.heads},
             {"batches", tile.batches},
             {"most_threads", tile.most_threads},
             {"merge", word(plan.merge, {"block", "cluster", "grid"})},
             {"threads", plan.warps * 32},
             {"cluster", plan.merge == Merge::kCluster ? plan.splits : 1},
             {"blocks", decode_blocks(plan, groups, p.batch)},
             {"splits", decode_splits(plan, groups, p.batch, most_keys)},
             {"on_device", plan.slots > 0 || plan.share > 0},
             {"shared_bytes", decode_shared_bytes(plan, rows)}};
}

Map prefill_map(const PrefillPlan& plan, const AttentionProblem& p, int64_t sms) {
  const PrefillRow& tile = prefill_row(plan.tile);
  return Map{{"kernel", ffi::String(kPrefillKernel)},
             {"tile", plan.tile},
             {"head_size", tile.head_size},
             {"keys", word(tile.keys, {"boxes", "rows", "e4m3"})},
             {"most_groups", tile.groups},
             {"groups", plan.shape.groups},
             {"stages", tile.stages},
             {"query_slots", tile.query_slots},
             {"threads", (plan.shape.groups + 1) * 128},
             {"blocks", prefill_blocks(p, plan.shape, sms)},
             {"paired", plan.shape.paired},
             {"turns", plan.shape.turns},
             {"persistent", plan.shape.persistent},
             {"shared_bytes", tile.shared_bytes},
             {"group_registers", tile.registers},
             {"loader_registers", tile.loader_registers}};
}

// page_size 0: not paged. packed: the lengths are those of all sequences together. prefix_len and window: -1 for none.
Map plan_map(int64_t sms, int64_t batch, int64_t q_len, int64_t k_len, int64_t q_heads, int64_t k_heads,
             int64_t head_size, bool f16, bool e4m3, int64_t page_size, bool packed, bool causal, int64_t prefix_len,
             int64_t window_left, int64_t window_right, int64_t num_splits, bool batch_invariant) {
  alignas(16) static char place[16];
  const auto* numbers = reinterpret_cast<const int32_t*>(place);
  AttentionProblem p{};
  p.q = p.k = p.v = p.out = place;
  p.q_dtype = f16 ? DType::kF16 : DType::kBF16, p.kv_dtype = e4m3 ? DType::kE4M3 : p.q_dtype;
  p.batch = batch, p.q_heads = q_heads, p.k_heads = k_heads, p.head_size = head_size;
  p.q_len = q_len, p.k_len = k_len;
  if (page_size > 0) {
    p.page_table = numbers, p.page_size = page_size, p.page_table_stride = (k_len + page_size - 1) / page_size;
    p.pages = batch * p.page_table_stride, p.k_len = p.page_table_stride * page_size;
  }
  if (packed) p.cu_seqlens_q = p.cu_seqlens_k = numbers;
  const auto strides = [&](int64_t tokens, int64_t heads) {
    return AttentionStrides{packed ? 0 : tokens * heads * head_size, heads * head_size, head_size};
  };
  p.q_stride = p.out_stride = strides(q_len, q_heads);
  p.k_stride = p.v_stride = strides(page_size > 0 ? page_size : k_len, k_heads);
  p.causal = causal || prefix_len >= 0, p.prefix_len = prefix_len;
  p.window_left = window_left, p.window_right = window_right;
  DecodeHints hints{p.k_len, num_splits};
  hints.batch_invariant = batch_invariant;
  const AttentionPlan plan = attention_plan(p, hints, sms);
  if (plan.decode) return decode_map(*plan.decode, p, k_len);
  if (plan.prefill) return prefill_map(*plan.prefill, p, sms);
  return Map{{"kernel", ffi::String(kPlainKernel)}};
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_plan, plan_map);
