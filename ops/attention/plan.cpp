#include "ops/attention/plan.h"

#include <algorithm>
#include <iterator>

#include "kestrel/arithmetic.h"
#include "ops/attention/compiled_tiles.h"

namespace kestrel {
namespace {

constexpr int64_t kMostKeys = int64_t{1} << 30;

// Rows of whole 16 bytes (8 of e4m3), at such addresses.
bool vectors_fit(const void* data, const AttentionStrides& s, DType dtype) {
  return aligned_to(data, 8 * size_of(dtype)) && s.batch % 8 == 0 && s.token % 8 == 0 && s.head % 8 == 0;
}

bool boxes_fit(const AttentionStrides& s) {
  constexpr int64_t kEnd = int64_t{1} << 39;  // elements of 16 bits
  const auto fits = [](int64_t stride) { return stride >= 0 && stride < kEnd; };
  return fits(s.batch) && fits(s.token) && fits(s.head);
}

// Blocks' worth of work, of so many groups each.
int64_t prefill_tiles(const AttentionProblem& p, int groups) {
  return (p.cu_seqlens_q ? 1 : p.batch) * p.q_heads * row_tiles_of(p, groups);
}

PrefillShape prefill_shape(const AttentionProblem& p, int most_groups, int64_t sms) {
  const bool causal = p.causal && p.prefix_len < 0 && !p.prefix_lens;
  // A prefix of 730 of 740, 32 heads of 64: 13.4 us, 13.8 without turns; 729 keys of 16 x 72: 11.2 us, 11.5 without;
  // 8192 of 16 x 128: 836 us, 790 without.
  const bool turns = !causal && p.head_size <= kPrefillRule.turns_head;
  // One wave: as many blocks as there are SMs for. Each has long and short rows of a causal mask.
  for (int groups = 1; groups <= most_groups; ++groups)
    if (prefill_tiles(p, groups) <= sms) return {groups, true, groups > 1 && turns, false};
  // Tiles of one length: a block that goes from one to the next has its loads ahead (13 x 729 keys of 16 x 72: 76.5
  // us, 87.6 without). Of different lengths, each SM had better take the next when it is done with one.
  const bool even = !p.causal && p.window_left < 0 && p.window_right < 0 && !p.cu_seqlens_q;
  return {most_groups, false, turns, even && p.head_size <= kPrefillRule.persistent_head};
}

// The cache is made of units of 16 bytes, and 32 bits reach its end in these.
bool units_fit(const AttentionProblem& p, int64_t pages, int64_t page_size) {
  const int64_t size = size_of(p.kv_dtype), strides[3] = {p.k_stride.batch, p.k_stride.token, p.k_stride.head};
  const int64_t counts[3] = {pages, page_size, p.k_heads};
  int64_t end = ceil_div(p.head_size * size, 16);
  for (int i = 0; i < 3; ++i) {
    const int64_t stride = strides[i] * size / 16;
    if (strides[i] < 0 || strides[i] * size % 16 || stride >> 32) return false;
    if (counts[i] > 1 && stride > 0 && counts[i] - 1 > (int64_t{1} << 32) / stride) return false;
    end += stride * (counts[i] - 1);
  }
  return end < int64_t{1} << 32;
}

// Rows of q or out: strides of whole vectors, and within 32 bits.
bool in_vectors(const void* data, const AttentionStrides& stride, int64_t elements) {
  if (!aligned_to(data, elements * 2)) return false;
  for (const int64_t s : {stride.batch, stride.token, stride.head})
    if (s % elements || s < 0 || s >> 32) return false;
  return true;
}

bool decode_takes(const AttentionProblem& p) {
  const int64_t kv_size = size_of(p.kv_dtype), pages = p.page_table ? p.pages : p.batch;
  const int64_t page_size = p.page_table ? p.page_size : std::max<int64_t>(p.k_len, 1);
  if (p.cu_seqlens_q || p.cu_seqlens_k || p.q_len > kDecodeRule.most_queries || p.k_len == 0 || p.k_len >= kMostKeys ||
      p.batch > 65535 || p.q_heads * p.q_len > 65535 || p.head_size * kv_size % 16 || p.head_size % 8 ||
      page_size >= kMostKeys || p.batch * p.page_table_stride >= int64_t{1} << 31 || pages >= int64_t{1} << 31)
    return false;
  return p.k_stride == p.v_stride && aligned_to(p.k, 16) && aligned_to(p.v, 16) && units_fit(p, pages, page_size) &&
         in_vectors(p.q, p.q_stride, 8) && in_vectors(p.out, p.out_stride, 4);
}

}  // namespace

const PrefillRow& prefill_row(int tile) { return kPrefillRows[tile]; }
const DecodeRow& decode_row(int tile) { return kDecodeRows[tile]; }

int64_t row_tiles_of(const AttentionProblem& p, int groups) {
  return ceil_div(p.q_len, groups * cuda::kTileRows) + (p.cu_seqlens_q ? p.batch : 0);
}

int64_t prefill_blocks(const AttentionProblem& p, const PrefillShape& shape, int64_t sms) {
  const int64_t tiles = prefill_tiles(p, shape.groups);
  return shape.persistent ? std::min(tiles, sms) : tiles;
}

std::optional<PrefillPlan> prefill_plan(const AttentionProblem& p, int64_t sms) {
  const int64_t sequences = p.cu_seqlens_q ? p.batch : 1;
  if (p.head_size % 8 != 0 || p.head_size < kPrefillRule.least_head ||
      p.q_len <= kDecodeRule.most_queries * sequences || p.q_len + p.k_len >= kMostKeys ||
      p.batch >= kMostKeys / p.q_heads)
    return std::nullopt;
  if (!vectors_fit(p.q, p.q_stride, p.q_dtype) || !vectors_fit(p.out, p.out_stride, p.q_dtype) ||
      !vectors_fit(p.k, p.k_stride, p.kv_dtype) || !vectors_fit(p.v, p.v_stride, p.kv_dtype) || !boxes_fit(p.q_stride))
    return std::nullopt;
  const bool boxes = !p.page_table && boxes_fit(p.k_stride) && boxes_fit(p.v_stride);
  const KeySource keys = p.kv_dtype == DType::kE4M3 ? KeySource::kE4m3Rows
                         : boxes                    ? KeySource::kBoxes
                                                    : KeySource::kRows;
  for (const PrefillRow& row : kPrefillRows) {
    if (row.head_size < p.head_size || row.keys != keys) continue;
    const PrefillShape shape = prefill_shape(p, row.groups, sms);
    // Another tile for the same, of more groups, serves launches of several waves, but where all work is of one length
    // and comes to more rounds' worth in it: 4 x 729 keys of 16 x 72 take 27 us in three groups, 29 in four.
    const PrefillRow* next = &row + 1;
    const bool another = next != std::end(kPrefillRows) && next->head_size == row.head_size && next->keys == keys;
    const auto rounds = [&](int groups) { return ceil_div(prefill_tiles(p, groups), sms) * groups; };
    if (another && !shape.paired && !(shape.persistent && rounds(row.groups) < rounds(next->groups))) continue;
    if (prefill_tiles(p, shape.groups) >= kMostKeys) return std::nullopt;
    return PrefillPlan{static_cast<int>(&row - kPrefillRows), shape};
  }
  return std::nullopt;
}

int64_t decode_groups(const DecodeRow& tile, int64_t k_heads, int64_t rows) {
  return tile.heads ? k_heads / tile.heads : k_heads * ceil_div(rows, 8);
}

int64_t decode_blocks(const DecodePlan& plan, int64_t groups, int64_t batch) {
  const int64_t whole = groups * batch;
  if (plan.slots) return whole + plan.slots;
  return plan.merge == Merge::kBlock ? whole : whole * plan.splits;
}

int64_t decode_splits(const DecodePlan& plan, int64_t groups, int64_t batch, int64_t keys) {
  if (plan.share) return std::max<int64_t>(ceil_div(keys, plan.share), 1);
  if (!plan.slots) return std::max(plan.splits, 1);
  const auto least = static_cast<float>(plan.warps * decode_row(plan.tile).tokens());
  const float share = std::max(static_cast<float>(batch * keys) * static_cast<float>(groups) / plan.slots, least);
  return std::clamp(static_cast<int>(static_cast<float>(keys) / share + 0.7f), 1, kMostSplits);
}

// Parts are a float4 of 4 columns of a row each, and a maximum and a sum of each row; odd pitches avoid bank conflicts.
int64_t decode_shared_bytes(const DecodePlan& plan, int64_t rows) {
  const DecodeRow& tile = decode_row(plan.tile);
  const int64_t blocks = plan.merge == Merge::kCluster ? plan.splits : 1, parts = plan.warps * blocks;
  rows = tile.heads ? tile.heads : std::min<int64_t>(rows, 8);
  const int64_t units = ceil_div(rows * tile.size / 4, blocks);
  return parts * ((units | 1) * 16 + (rows | 1) * 8);
}

// Its share of the counters included.
int64_t decode_split_bytes(const DecodePlan& plan) {
  const DecodeRow& tile = decode_row(plan.tile);
  const int64_t rows = tile.heads ? tile.heads : 8;
  return (rows * tile.size / 4 + (rows + 1) / 2) * 16 + 8;
}

std::optional<DecodePlan> decode_plan(const AttentionProblem& p, const DecodeHints& h, int64_t sms) {
  if (!decode_takes(p)) return std::nullopt;
  constexpr const DecodeRule& kRule = kDecodeRule;
  const int64_t rows = p.q_heads / p.k_heads * p.q_len, sequences = p.batch * p.k_heads;
  const int64_t keys = p.window_left >= 0 ? std::min(h.most_keys, p.window_left + p.q_len) : h.most_keys;
  // Of batch-invariant results, only the number of blocks may follow from more than the sequence and its room.
  const int64_t all_keys = h.batch_invariant ? 0 : sequences * keys, batch = h.batch_invariant ? 0 : p.batch;
  DecodePlan plan{-1};
  const auto choose = [&](Merge merge) {
    for (const DecodeRow& row : kDecodeRows) {
      const bool fits = (row.whole ? p.head_size == row.size : p.head_size < row.size) && keys > row.above &&
                        (!row.up_to || keys <= row.up_to);
      if (!fits || !(row.keys & (p.kv_dtype == DType::kE4M3 ? 2 : 1)) || !(row.merges >> static_cast<int>(merge) & 1) ||
          (row.heads && (rows > 1 || p.k_heads % row.heads)) || all_keys < row.least_keys ||
          batch * decode_groups(row, p.k_heads, rows) < row.least_blocks_per_sm * sms)
        continue;
      plan.tile = static_cast<int>(&row - kDecodeRows);
      plan.merge = merge;
      return true;
    }
    return false;
  };
  const auto tile = [&]() -> const DecodeRow& { return decode_row(plan.tile); };
  const auto blocks = [&] { return p.batch * decode_groups(tile(), p.k_heads, rows); };
  const auto steps = [&] { return ceil_div(keys, tile().tokens()); };
  const auto large = [&] { return tile().size > 128; };  // eight of its warps fill an SM
  const auto warps_per_sm = [&] { return large() ? kRule.warps_per_sm / 2 : kRule.warps_per_sm; };
  // Warps of a block: even.
  const auto even = [](int64_t warps) { return static_cast<int>(std::max<int64_t>(warps / 2 * 2, 2)); };
  if (h.batch_invariant) {
    if (!choose(Merge::kGrid)) return std::nullopt;
    const int64_t fit = kAttentionWorkspaceBytes / (decode_groups(tile(), p.k_heads, rows) * decode_split_bytes(plan));
    const int64_t splits = std::clamp<int64_t>(fit, 1, kRule.invariant_splits);
    plan.share = static_cast<int>(std::max<int64_t>(kRule.invariant_share, ceil_div(p.k_len, splits)));
    plan.splits = static_cast<int>(ceil_div(p.k_len, plan.share));
    return plan;
  }
  if (h.num_splits > 1) {
    if (!choose(Merge::kGrid)) return std::nullopt;
    plan.splits = static_cast<int>(std::min<int64_t>(h.num_splits, kMostSplits));
    plan.warps = even(std::min({warps_per_sm() * sms / (blocks() * plan.splits), int64_t{8}, steps() / plan.splits}));
    return plan;
  }
  // Two heads in a block share the work on a fragment, which pays where memory alone binds, and in e4m3 sooner.
  if (!choose(Merge::kBlock)) return std::nullopt;
  const bool whole = sequences * 10 >= 9 * sms;  // blocks enough without splits
  if (h.num_splits == 1 || (whole && keys <= kRule.block_keys)) {
    const bool two = keys <= 512 || p.kv_dtype == DType::kE4M3;  // 64 x 1024 keys: 68 us of e4m3 with four, 65 with two
    const int64_t wanted = std::max<int64_t>(warps_per_sm() * sms / blocks(), keys > 1024 ? 8 : two ? 2 : 4);
    const int64_t most = std::min(tile().most_threads / 32, tile().size > 64 && p.kv_dtype == DType::kE4M3 ? 8 : 16);
    // Two steps or one, and four of the large tile, so that two blocks fit an SM: 256 keys of 128 take 17.8 us in
    // blocks of four warps, 22.8 of eight.
    const int64_t busy = large()                       ? std::max<int64_t>(steps() / 4, 4)
                         : steps() > kRule.block_steps ? ceil_div(steps(), 2) + 1
                                                       : steps() + 1;
    plan.warps = tile().warps ? tile().warps : even(std::min({wanted, most, busy}));
    return plan;
  }
  if (steps() <= (tile().heads ? kRule.block_steps : kRule.block_steps_rows)) {
    plan.warps = even(steps() + 1);
    return plan;
  }
  if (keys <= kRule.cluster_keys) {
    if (!choose(Merge::kCluster)) return std::nullopt;
    if (tile().size <= 64) {
      // A block on an SM, on half of them, so that the next kernel's find room beside: 1024 keys of 32 heads take 5.3
      // us in pairs of 16 warps, 5.7 in eights of two, whose last begin when the kernel before has ended.
      plan.splits = static_cast<int>(std::clamp<int64_t>(sms / 2 / blocks(), 1, 8));
      // Clusters of more than two pack badly where a block has an SM for itself.
      const int64_t most = plan.splits > 2 ? 8 : tile().most_threads / 32;
      plan.warps = even(std::min(ceil_div(steps(), plan.splits) + 1, most));
    } else if (large()) {
      // Of an even size, as SMs come in pairs, beside the next kernel's or alone, where sizes do not fill all SMs: 1024
      // keys of 16 take 9.5 us in sixes, 11.0 in eights, 11.5 in fives; 900 of 24 take 12.3 in sixes, 10.5 in eights.
      const int64_t room = sms * 6 / 7 * (blocks() <= sms / 8 ? 1 : 2);
      plan.splits = blocks() * 16 <= room ? 16 : even(std::min<int64_t>(room / blocks(), 8));
      const int64_t each = ceil_div(steps(), plan.splits);
      plan.warps = each > 12 && plan.splits * blocks() <= sms ? 8 : each > 2 ? 4 : 2;
    } else {
      plan.splits = blocks() <= kRule.large_cluster_blocks ? 16 : 8;
      while (plan.splits > 2 && (plan.splits * blocks() > kRule.cluster_blocks_per_sm * sms || plan.splits > steps()))
        plan.splits /= 2;
      // A step for each warp, or two where that would make more warps than start at once.
      const int64_t each = ceil_div(steps(), plan.splits),
                    needed = each > 3 && plan.splits * blocks() > sms ? each / 2 : each;
      plan.warps = needed > 4 ? 8 : needed > 2 ? 4 : 2;
    }
    plan.splits = static_cast<int>(std::min<int64_t>(plan.splits, ceil_div(steps(), plan.warps)));
    if (plan.splits > 1) return plan;
    plan.splits = 0, plan.merge = Merge::kBlock;
    return plan;
  }
  if (p.batch * p.k_len >= int64_t{1} << 31) return plan;  // the sum of the lengths, too, fits 32 bits
  if (!choose(Merge::kGrid)) return std::nullopt;
  plan.warps = static_cast<int>(tile().heads ? kRule.grid_warps : kRule.grid_warps_rows);
  const int64_t slots = tile().heads ? kRule.warps_per_sm / plan.warps * sms : sms;
  if (p.batch == 1) {
    int64_t most = std::min({slots / blocks(), int64_t{kMostSplits}, steps() / 4});
    if (large()) most = std::min(most, std::max<int64_t>(steps() / 16, 32));  // 8192 keys: 17.7 us in 64, 15.0 in 32
    const int64_t turns = ceil_div(steps(), plan.warps * std::max<int64_t>(most, 1));
    plan.splits = static_cast<int>(ceil_div(steps(), plan.warps * turns));
  } else {
    plan.slots = static_cast<int>(slots);
  }
  return plan;
}

AttentionPlan attention_plan(const AttentionProblem& p, const DecodeHints& h, int64_t sms) {
  if (const auto decode = decode_plan(p, h, sms)) return {decode, {}};
  return {{}, prefill_plan(p, sms)};
}

}  // namespace kestrel
