#include <algorithm>
#include <type_traits>

#include "kestrel/launch.h"
#include "ops/attention/compiled_decode.h"

namespace kestrel::cuda {
namespace {

int clamped(int64_t value) { return static_cast<int>(std::min(value, int64_t{1} << 30)); }

// The problem in the kernels' terms.
DecodeArgs decode_args(const AttentionProblem& p, const DecodeHints& h) {
  DecodeArgs a{};
  a.k = static_cast<const char*>(p.k), a.v = static_cast<const char*>(p.v), a.q = p.q, a.out = p.out;
  a.table = p.page_table, a.lengths = p.seqused_k;
  const auto units = [&](int64_t stride) { return static_cast<uint32_t>(stride * size_of(p.kv_dtype) / 16); };
  a.page = units(p.k_stride.batch), a.token = units(p.k_stride.token), a.head = units(p.k_stride.head);
  a.table_stride = static_cast<uint32_t>(p.page_table_stride);
  a.q_batch = static_cast<uint32_t>(p.q_stride.batch), a.out_batch = static_cast<uint32_t>(p.out_stride.batch);
  a.q_token = static_cast<uint32_t>(p.q_stride.token), a.out_token = static_cast<uint32_t>(p.out_stride.token);
  a.q_head = static_cast<uint32_t>(p.q_stride.head), a.out_head = static_cast<uint32_t>(p.out_stride.head);
  a.by_page_size = Divider<uint32_t>(p.page_table ? p.page_size : (int64_t{1} << 31) - 1);
  const int64_t group = p.q_heads / p.k_heads;
  a.pages = static_cast<int>(p.page_table ? p.pages : p.batch), a.k_len = static_cast<int>(p.k_len),
  a.q_len = static_cast<int>(p.q_len);
  a.group = static_cast<int>(group), a.rows = static_cast<int>(group * p.q_len), a.by_group = Divider<uint32_t>(group);
  a.head_size = static_cast<int>(p.head_size), a.batch = static_cast<int>(p.batch);
  a.score_scale = p.softmax_scale * (p.k_scale_at ? 1.0f : p.k_scale) * (p.softcap > 0.0f ? 1.0f : 1.44269504f);
  a.v_scale = p.v_scale, a.k_scale_at = p.k_scale_at, a.v_scale_at = p.v_scale_at;
  a.fresh = h.fresh_tokens ? clamped(*h.fresh_tokens) : -1;
  a.window_left = clamped(p.window_left), a.window_right = clamped(p.window_right);
  a.prefix_len = clamped(p.prefix_len), a.prefix_lens = p.prefix_lens;
  a.softcap = p.softcap, a.sink = p.sink, a.sink_dtype = p.sink_dtype;
  a.lse = p.lse, a.lse_stride = p.lse_stride;
  const auto feature = [&](bool is, uint32_t which) { a.features |= is ? which : 0; };
  // The newest token sees all keys, but for those before a window.
  feature(p.causal && p.q_len > 1, a.kCausal);
  feature(p.window_left >= 0 || p.window_right >= 0, a.kWindow);
  feature((p.prefix_lens || p.prefix_len >= 0) && p.q_len > 1, a.kPrefix);
  feature(p.softcap > 0.0f, a.kSoftcap);
  feature(p.sink, a.kSink);
  feature(p.lse, a.kLse);
  feature(p.k_scale_at || p.v_scale_at, a.kScales);
  return a;
}

// False if the workspace does not hold its splits.
bool set_plan(const DecodePlan& plan, int64_t k_heads, const DecodeHints& h, DecodeArgs* args) {
  DecodeArgs& a = *args;
  const DecodeRow& tile = decode_row(plan.tile);
  a.by_row_tiles = Divider<uint32_t>(tile.heads ? 1 : ceil_div(a.rows, 8));
  a.groups = static_cast<int>(decode_groups(tile, k_heads, a.rows));
  a.splits = plan.splits, a.by_splits = Divider<uint32_t>(std::max(plan.splits, 1)), a.share = plan.share,
  a.slots = plan.slots;
  if (plan.merge != Merge::kGrid) return true;
  // Of sequences of more than 1.3 shares, twice as many parts as slots there cannot be.
  const int64_t parts = plan.slots ? 2 * plan.slots : int64_t{a.batch} * a.groups * plan.splits;
  a.partials = static_cast<float4*>(h.workspace);
  a.counters = reinterpret_cast<uint64_t*>(static_cast<char*>(h.workspace) + parts * (decode_split_bytes(plan) - 8));
  return h.workspace && parts * decode_split_bytes(plan) <= kAttentionWorkspaceBytes;
}

// `count` sequences from number `first` on, alone.
AttentionProblem some_of(AttentionProblem p, int64_t first, int64_t count) {
  const auto advance = [&](auto* data, int64_t elements, int64_t size) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(data)>>, const char, char>;
    return reinterpret_cast<decltype(data)>(reinterpret_cast<Byte*>(data) + first * elements * size);
  };
  p.batch = count;
  p.out = advance(p.out, p.out_stride.batch, size_of(p.q_dtype));
  p.q = advance(p.q, p.q_stride.batch, size_of(p.q_dtype));
  if (p.lse) p.lse += first * p.lse_stride.batch;
  if (p.seqused_k) p.seqused_k += first;
  if (p.prefix_lens) p.prefix_lens += first;
  if (p.page_table) {
    p.page_table += first * p.page_table_stride;
  } else {
    p.k = advance(p.k, p.k_stride.batch, size_of(p.kv_dtype));
    p.v = advance(p.v, p.v_stride.batch, size_of(p.kv_dtype));
  }
  return p;
}

}  // namespace

// The kernel's name is of one split where the workspace does not hold more.
const char* attention_decode(Stream stream, const AttentionProblem& p, const DecodeHints& h, DecodePlan plan) {
  DecodeArgs args = decode_args(p, h);
  if (!set_plan(plan, p.k_heads, h, &args)) {
    const int64_t split = int64_t{args.groups} * plan.splits * decode_split_bytes(plan);
    const int64_t at_once = plan.slots || !h.workspace ? 0 : kAttentionWorkspaceBytes / split;
    if (at_once > 0) {  // the workspace holds the splits of so many sequences
      for (int64_t b = 0; b < p.batch; b += at_once) {
        const AttentionProblem some = some_of(p, b, std::min(at_once, p.batch - b));
        attention_decode(stream, some, h, *decode_plan(some, h, sm_count()));
      }
      return plan.kernel();
    }
    plan.merge = Merge::kBlock;
    plan.splits = plan.share = plan.slots = 0;
    set_plan(plan, p.k_heads, h, &args);
  }
  const int types = (p.q_dtype == DType::kF16) + 2 * (p.kv_dtype == DType::kE4M3);
  kDecodeLaunches[plan.tile][static_cast<int>(plan.merge)][types](stream, args, plan);
  return plan.kernel();
}

}  // namespace kestrel::cuda
