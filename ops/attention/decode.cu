#include "ops/attention/decode.h"

#include <algorithm>

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
      p.q_heads * p.q_len > 65535 || p.head_size * kv_size % 16 || p.head_size % 8 || page_size >= kMostKeys ||
      p.batch * p.page_table_stride >= int64_t{1} << 31 || pages >= int64_t{1} << 31)
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

bool set_plan(const DecodePlan& plan, int64_t k_heads, const DecodeHints& h, DecodeArgs* args) {
  DecodeArgs& a = *args;
  const int64_t row_tiles = plan.heads ? 1 : ceil_div(a.rows, 8);
  a.by_row_tiles = Divider<uint32_t>(row_tiles);
  a.groups = static_cast<int>(k_heads / std::max(plan.heads, 1) * row_tiles);
  a.splits = plan.splits, a.share = plan.share, a.slots = plan.slots;
  if (plan.merge != Merge::kGrid) return true;
  const int64_t blocks = int64_t{a.batch} * a.groups;
  const int64_t parts = plan.slots ? 2 * plan.slots : blocks * plan.splits;
  const int64_t rows = plan.heads ? plan.heads : 8;
  const int64_t bytes = parts * (rows * plan.size / 4 + (rows + 1) / 2) * 16;
  a.partials = static_cast<float4*>(h.workspace);
  a.counters = reinterpret_cast<uint64_t*>(static_cast<char*>(h.workspace) + bytes);
  return h.workspace && bytes + parts * 8 <= kAttentionWorkspaceBytes;
}

// The rule, from the times of all tiles at the shapes of benchmarks/targets.json (one H200).
DecodePlan decode_plan(const AttentionProblem& p, const DecodeHints& h) {
  const int64_t rows = p.q_heads / p.k_heads * p.q_len, sequences = p.batch * p.k_heads;
  const int64_t keys = p.window_left >= 0 ? std::min(h.most_keys, p.window_left + p.q_len) : h.most_keys;
  const bool narrow = p.kv_dtype == DType::kE4M3, whole = p.head_size == 64;
  DecodePlan plan{.size = p.head_size <= 64 ? 64 : 128, .heads = 0, .batches = p.head_size <= 64 ? 2 : 1};
  const int64_t total = sequences * keys * p.head_size * size_of(p.kv_dtype) * 2;
  if (whole && rows == 1) {
    // Several heads share the work on a fragment: worth more the less there is to load for it.
    plan.heads = total < (16 << 20) || p.k_heads % 2 ? 1 : 2;
    if (!narrow && total < (256 << 20)) plan.heads = 1;
  }
  const int tokens = plan.batches * 16 / std::max(plan.heads, 1);
  const int64_t groups = p.k_heads / std::max(plan.heads, 1) * (plan.heads ? 1 : ceil_div(rows, 8));
  const int64_t blocks = p.batch * groups, steps = std::max<int64_t>(ceil_div(keys, tokens), 1);
  const int most = plan.size == 64 && plan.heads ? 16 : narrow ? 16 : 12;  // warps that an SM holds, and a block
  const auto warps_for = [&](int64_t at_once, int64_t steps) {             // of blocks of which so many share an SM
    int warps = most;
    while (warps > 2 && (warps * at_once > most || warps > steps)) warps = warps == 12 ? 8 : warps / 2;
    return warps;
  };
  if (h.batch_invariant) {
    // Everything but the number of blocks follows from the sequence alone.
    plan.heads = whole && rows == 1 ? 1 : 0;
    plan.merge = Merge::kGrid;
    plan.warps = 4;
    plan.share = static_cast<int>(std::max<int64_t>(512, ceil_div(p.k_len, 32)));
    plan.splits = static_cast<int>(ceil_div(p.k_len, plan.share));
    return plan;
  }
  if (h.num_splits > 0) {
    plan.splits = static_cast<int>(std::min<int64_t>(h.num_splits, kMostSplits));
    plan.merge = plan.splits == 1 ? Merge::kBlock : Merge::kGrid;
    plan.warps = warps_for(ceil_div(blocks * plan.splits, sm_count()), ceil_div(steps, plan.splits));
    return plan;
  }
  const int64_t sms = sm_count();
  if (blocks * 10 >= sms * 9 && (keys <= 4096 || blocks >= 8 * sms)) {
    plan.merge = Merge::kBlock;
    plan.warps = warps_for(ceil_div(blocks, sms), ceil_div(steps, 2));
    return plan;
  }
  if (steps <= 96) {
    plan.merge = Merge::kCluster;
    plan.splits = groups * p.batch <= 8 ? 16 : 8;
    while (plan.splits > 2 && (plan.splits * blocks > 2 * sms || plan.splits > steps)) plan.splits /= 2;
    plan.warps = warps_for(1, ceil_div(steps, plan.splits));
    plan.warps = std::min(plan.warps, 8);
    return plan;
  }
  plan.merge = Merge::kGrid;
  plan.warps = 8;
  const int64_t slots = sms * (most / plan.warps);
  if (p.batch == 1)
    plan.splits = static_cast<int>(std::clamp<int64_t>(slots / groups, 1, std::min<int64_t>(kMostSplits, steps / 8)));
  else
    plan.slots = static_cast<int>(slots);
  return plan;
}

const char* attention_decode(Stream stream, const AttentionProblem& p, const DecodeHints& h) {
  DecodeArgs args;
  if (compute_capability() != 90 || !decode_args(p, h, &args)) return nullptr;
  DecodePlan plan = decode_plan(p, h);
  if (!set_plan(plan, p.k_heads, h, &args)) {  // no room for splits
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
