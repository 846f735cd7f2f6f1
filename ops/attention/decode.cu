#include "ops/attention/decode.h"

#include <algorithm>
#include <type_traits>

#include "kestrel/launch.h"
#include "ops/attention/decode_args.h"

namespace kestrel::cuda {
namespace {

constexpr int64_t kMostKeys = int64_t{1} << 30;

// Strides of the cache in units of 16 bytes, if it is made of these and 32 bits reach its end.
bool in_units(const AttentionProblem& p, int64_t pages, int64_t page_size, uint32_t (&units)[3]) {
  const int64_t size = size_of(p.kv_dtype), strides[3] = {p.k_stride.batch, p.k_stride.token, p.k_stride.head};
  const int64_t counts[3] = {pages, page_size, p.k_heads};
  int64_t end = ceil_div(p.head_size * size, 16);
  for (int i = 0; i < 3; ++i) {
    const int64_t stride = strides[i] * size / 16;
    if (strides[i] < 0 || strides[i] * size % 16 || stride >> 32) return false;
    units[i] = static_cast<uint32_t>(stride);
    if (counts[i] > 1 && stride > 0 && counts[i] - 1 > (int64_t{1} << 32) / stride) return false;
    end += stride * (counts[i] - 1);
  }
  return end < int64_t{1} << 32;
}

// Rows of q or out: strides of whole vectors, and within 32 bits.
bool in_vectors(const void* data, const AttentionStrides& stride, int64_t elements) {
  if (reinterpret_cast<uintptr_t>(data) % (elements * 2)) return false;
  for (const int64_t s : {stride.batch, stride.token, stride.head})
    if (s % elements || s < 0 || s >> 32) return false;
  return true;
}

int clamped(int64_t value) { return static_cast<int>(std::min(value, kMostKeys)); }

}  // namespace

bool decode_args(const AttentionProblem& p, const DecodeHints& h, DecodeArgs* args) {
  const int64_t kv_size = size_of(p.kv_dtype), pages = p.page_table ? p.pages : p.batch;
  const int64_t page_size = p.page_table ? p.page_size : std::max<int64_t>(p.k_len, 1);
  uint32_t units[3];
  if (p.cu_seqlens_q || p.cu_seqlens_k || p.q_len > 16 || p.k_len == 0 || p.k_len >= kMostKeys || p.batch > 65535 ||
      p.q_heads * p.q_len > 65535 || p.head_size > 128 || p.head_size * kv_size % 16 || p.head_size % 8 ||
      page_size >= kMostKeys || p.batch * p.page_table_stride >= int64_t{1} << 31 || pages >= int64_t{1} << 31)
    return false;
  if (p.k_stride != p.v_stride || reinterpret_cast<uintptr_t>(p.k) % 16 || reinterpret_cast<uintptr_t>(p.v) % 16 ||
      !in_units(p, pages, page_size, units) || !in_vectors(p.q, p.q_stride, 8) || !in_vectors(p.out, p.out_stride, 4))
    return false;
  DecodeArgs& a = *args = {};
  a.k = static_cast<const char*>(p.k), a.v = static_cast<const char*>(p.v), a.q = p.q, a.out = p.out;
  a.table = p.page_table, a.lengths = p.seqused_k;
  a.page = units[0], a.token = units[1], a.head = units[2];
  a.table_stride = static_cast<uint32_t>(p.page_table_stride);
  a.q_batch = static_cast<uint32_t>(p.q_stride.batch), a.out_batch = static_cast<uint32_t>(p.out_stride.batch);
  a.q_token = static_cast<uint32_t>(p.q_stride.token), a.out_token = static_cast<uint32_t>(p.out_stride.token);
  a.q_head = static_cast<uint32_t>(p.q_stride.head), a.out_head = static_cast<uint32_t>(p.out_stride.head);
  a.by_page_size = Divider<uint32_t>(p.page_table ? page_size : (int64_t{1} << 31) - 1);
  const int64_t group = p.q_heads / p.k_heads;
  a.pages = static_cast<int>(pages), a.k_len = static_cast<int>(p.k_len), a.q_len = static_cast<int>(p.q_len);
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
  feature(p.causal, a.kCausal);
  feature(p.window_left >= 0 || p.window_right >= 0, a.kWindow);
  feature(p.prefix_lens || p.prefix_len >= 0, a.kPrefix);
  feature(p.softcap > 0.0f, a.kSoftcap);
  feature(p.sink, a.kSink);
  feature(p.lse, a.kLse);
  feature(p.k_scale_at || p.v_scale_at, a.kScales);
  return true;
}

// What a split of a group of heads or rows leaves in the workspace, its share of the counters included.
int64_t split_bytes(const DecodePlan& plan) {
  const int64_t rows = plan.heads ? plan.heads : 8;
  return (rows * plan.size / 4 + (rows + 1) / 2) * 16 + 8;
}
int64_t groups_of(const DecodePlan& plan, int64_t k_heads, int64_t rows) {
  return plan.heads ? k_heads / plan.heads : k_heads * ceil_div(rows, 8);
}

bool set_plan(const DecodePlan& plan, int64_t k_heads, const DecodeHints& h, DecodeArgs* args) {
  DecodeArgs& a = *args;
  a.by_row_tiles = Divider<uint32_t>(plan.heads ? 1 : ceil_div(a.rows, 8));
  a.groups = static_cast<int>(groups_of(plan, k_heads, a.rows));
  a.splits = plan.splits, a.share = plan.share, a.slots = plan.slots;
  if (plan.merge != Merge::kGrid) return true;
  // Of sequences of more than 1.3 shares, twice as many parts as slots there cannot be.
  const int64_t parts = plan.slots ? 2 * plan.slots : int64_t{a.batch} * a.groups * plan.splits;
  a.partials = static_cast<float4*>(h.workspace);
  a.counters = reinterpret_cast<uint64_t*>(static_cast<char*>(h.workspace) + parts * (split_bytes(plan) - 8));
  return h.workspace && parts * split_bytes(plan) <= kAttentionWorkspaceBytes;
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

// The rule. It follows the times of all tiles at decode's rows of benchmarks/targets.json, one H200.
DecodePlan decode_plan(const AttentionProblem& p, const DecodeHints& h) {
  const int64_t rows = p.q_heads / p.k_heads * p.q_len, sms = sm_count();
  const int64_t keys = p.window_left >= 0 ? std::min(h.most_keys, p.window_left + p.q_len) : h.most_keys;
  const bool narrow = p.kv_dtype == DType::kE4M3, by_heads = p.head_size == 64 && rows == 1;
  DecodePlan plan{};
  plan.size = p.head_size <= 64 ? 64 : 128;
  plan.batches = plan.size == 64 ? 2 : 1;
  const auto groups = [&] { return groups_of(plan, p.k_heads, rows); };
  const auto steps = [&] { return ceil_div(keys, plan.batches * 16 / std::max(plan.heads, 1)); };
  // Warps of a block, a power of two or 12: `wanted` of them, rounded down, and none without keys.
  const auto warps = [&](int64_t wanted, int64_t most) {
    wanted = std::min(wanted, std::max<int64_t>(most, 2));
    return wanted >= 16 ? 16 : wanted >= 12 ? 12 : wanted >= 8 ? 8 : wanted >= 4 ? 4 : 2;
  };
  if (h.batch_invariant) {
    // Nothing but the number of blocks follows from more than the sequence and the room there is for it.
    plan.heads = by_heads ? 1 : 0;
    plan.merge = Merge::kGrid;
    const int64_t fit = kAttentionWorkspaceBytes / (groups() * split_bytes(plan));
    plan.share = static_cast<int>(std::max<int64_t>(512, ceil_div(p.k_len, std::clamp<int64_t>(fit, 1, 16))));
    plan.splits = static_cast<int>(ceil_div(p.k_len, plan.share));
    return plan;
  }
  const int64_t sequences = p.batch * p.k_heads;
  const bool whole = sequences * 10 >= 9 * sms;  // blocks enough without splits
  // Two heads in a block share the work on a fragment, which pays where memory alone binds, and in e4m3 sooner.
  if (by_heads) plan.heads = p.k_heads % 2 == 0 && sequences * keys >= (narrow ? 1 << 17 : 1 << 20) ? 2 : 1;
  const int64_t blocks = p.batch * groups();
  if (h.num_splits > 1) {
    plan.merge = Merge::kGrid;
    plan.splits = static_cast<int>(std::min<int64_t>(h.num_splits, kMostSplits));
    plan.warps = warps(std::min<int64_t>(16 * sms / (blocks * plan.splits), 8), steps() / plan.splits);
    return plan;
  }
  if (h.num_splits == 1 || (whole && (keys <= 4096 || blocks > 8 * sms))) {
    const int64_t wanted = std::max<int64_t>(16 * sms / blocks, keys > 1024 ? 8 : 2);
    plan.warps = warps(std::min<int64_t>(wanted, by_heads ? 16 : 12), ceil_div(steps(), 2));
    if (p.head_size == 128 && narrow != (blocks >= 3 * sms)) plan.batches = 2, plan.warps = narrow ? 4 : 2;
    return plan;
  }
  if (keys <= 2048) {
    plan.merge = Merge::kCluster;
    if (p.head_size == 128) plan.batches = 2;
    plan.splits = blocks <= 8 ? 16 : 8;
    while (plan.splits > 2 && (plan.splits * blocks > 2 * sms || plan.splits > steps())) plan.splits /= 2;
    // A step for each warp, or two where that would make more warps than start at once.
    const int64_t each = ceil_div(steps(), plan.splits),
                  needed = each > 3 && plan.splits * blocks > sms ? each / 2 : each;
    plan.warps = needed > 4 ? 8 : needed > 2 ? 4 : 2;
    return plan;
  }
  if (p.batch * p.k_len >= int64_t{1} << 31) return plan;  // the sum of the lengths, too, fits 32 bits
  plan.merge = Merge::kGrid;
  if (narrow && p.head_size == 128) plan.batches = 2;
  plan.warps = plan.heads == 1 ? 4 : 8;
  const int64_t slots = plan.heads ? 16 / plan.warps * sms : sms;
  if (p.batch == 1)
    plan.splits = static_cast<int>(std::clamp<int64_t>(slots / blocks, 1, std::min<int64_t>(kMostSplits, steps() / 4)));
  else
    plan.slots = static_cast<int>(slots);
  return plan;
}

const char* attention_decode(Stream stream, const AttentionProblem& p, const DecodeHints& h) {
  DecodeArgs args;
  if (compute_capability() != 90 || !decode_args(p, h, &args)) return nullptr;
  DecodePlan plan = decode_plan(p, h);
  if (!set_plan(plan, p.k_heads, h, &args)) {
    const int64_t at_once = plan.slots || !h.workspace
                                ? 0
                                : kAttentionWorkspaceBytes / (int64_t{args.groups} * plan.splits * split_bytes(plan));
    if (at_once > 0) {  // the workspace holds the splits of so many sequences
      const char* name = nullptr;
      for (int64_t b = 0; b < p.batch; b += at_once)
        name = attention_decode(stream, some_of(p, b, std::min(at_once, p.batch - b)), h);
      return name;
    }
    plan.merge = Merge::kBlock;
    plan.splits = plan.share = plan.slots = 0;
    set_plan(plan, p.k_heads, h, &args);
  }
  bool launched = false;
  dispatch<bf16, f16>(p.q_dtype, [&]<class Q>() {
    dispatch<Q, e4m3>(p.kv_dtype, [&]<class KV>() { launched = launch_decode<Q, KV>(stream, args, plan); });
  });
  if (!launched) return nullptr;
  return plan.merge == Merge::kBlock ? "FlashAttentionDecodeSm90" : "FlashAttentionDecodeSm90PersistentSplitFused";
}

}  // namespace kestrel::cuda
