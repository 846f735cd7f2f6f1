// Which problems the prefill kernel serves, and how a launch spreads its work.
#include "kestrel/launch.h"
#include "ops/attention/prefill.h"

namespace kestrel::cuda {
namespace {

constexpr int kFewQueries = 16;  // up to here the decode kernels are the better ones
constexpr int kLeastHead = 40;   // below, most of a tile of 64 columns would be padding

struct Head {
  int size;
  PrefillHead* launch;
  int groups, row_groups, e4m3_groups;  // the most in a block, by where the keys come from
};
constexpr Head kHeads[] = {{64, prefill_64, 4, 3, 3}, {72, prefill_72, 3, 3, 3},   {80, prefill_80, 3, 3, 3},
                           {96, prefill_96, 3, 3, 2}, {128, prefill_128, 3, 3, 2}, {256, prefill_256, 2, 2, 0}};

// Rows of whole 16 bytes (8 of e4m3), at such addresses.
bool vectors_fit(const void* data, const AttentionStrides& s, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % (8 * size_of(dtype)) == 0 && s.batch % 8 == 0 && s.token % 8 == 0 &&
         s.head % 8 == 0;
}

bool boxes_fit(const AttentionStrides& s) {
  constexpr int64_t kEnd = int64_t{1} << 39;  // elements of 16 bits
  const auto fits = [](int64_t stride) { return stride >= 0 && stride < kEnd; };
  return fits(s.batch) && fits(s.token) && fits(s.head);
}

PrefillShape shape_of(const AttentionProblem& p, int most_groups) {
  const int64_t heads = (p.cu_seqlens_q ? 1 : p.batch) * p.q_heads;
  const bool causal = p.causal && p.prefix_len < 0 && !p.prefix_lens;
  // One wave: as many blocks as there are SMs for. Each has long and short rows of a causal mask.
  for (int groups = 1; groups <= most_groups; ++groups)
    if (heads * row_tiles_of(p, groups) <= sm_count()) return {groups, true, groups > 1 && !causal, false};
  // Tiles of one length: a block that goes from one to the next has its loads ahead (13 x 729 keys of 16 x 72: 89 us,
  // 106 without). Of different lengths, each SM had better take the next when it is done with one.
  const bool even = !p.causal && p.window_left < 0 && p.window_right < 0 && !p.cu_seqlens_q;
  const bool small = p.head_size <= 80;  // at 128, neither this nor turns gains anything
  return {most_groups, false, small, small && even};
}

}  // namespace

bool attention_prefill(Stream stream, const AttentionProblem& p) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (compute_capability() != 90 || p.head_size % 8 != 0 || p.head_size < kLeastHead) return false;
  const int64_t sequences = p.cu_seqlens_q ? p.batch : 1;
  if (p.q_len <= kFewQueries * sequences || p.q_len + p.k_len >= kMost || p.batch >= kMost / p.q_heads) return false;
  if (!vectors_fit(p.q, p.q_stride, p.q_dtype) || !vectors_fit(p.out, p.out_stride, p.q_dtype) ||
      !vectors_fit(p.k, p.k_stride, p.kv_dtype) || !vectors_fit(p.v, p.v_stride, p.kv_dtype) || !boxes_fit(p.q_stride))
    return false;
  const bool converted = p.kv_dtype == DType::kE4M3;
  const KeySource source = converted                                                         ? KeySource::kE4m3Rows
                           : !p.page_table && boxes_fit(p.k_stride) && boxes_fit(p.v_stride) ? KeySource::kBoxes
                                                                                             : KeySource::kRows;
  for (const Head& head : kHeads) {
    if (p.head_size > head.size) continue;
    const int groups = source == KeySource::kBoxes  ? head.groups
                       : source == KeySource::kRows ? head.row_groups
                                                    : head.e4m3_groups;
    if (groups == 0) return false;
    const PrefillShape shape = shape_of(p, groups);
    if ((p.cu_seqlens_q ? 1 : p.batch) * p.q_heads * row_tiles_of(p, shape.groups) >= kMost) return false;
    head.launch(stream, p, source, shape);
    return true;
  }
  return false;
}

}  // namespace kestrel::cuda
