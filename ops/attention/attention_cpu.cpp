// Online softmax (Milakov & Gimelshein 2018) over blocks of 64 keys (Dao et al. 2022, FlashAttention). A piece of work
// is one key head and a block of queries with all the query heads of its group: each key block becomes fp32 once for
// all of them, K transposed. Blocks begin at multiples of 64 keys and a row's sums run in the order of its keys, so a
// row's bits depend on nothing else in the batch. Bound by the two products' FMAs; with one query, by the conversion.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kestrel/cpu/parallel.h"
#include "ops/attention/problem.h"
#include "ops/attention/tile_cpu.h"

namespace KESTREL_CPU {
namespace {

constexpr int kKeys = 64;
constexpr int kRows = 96;  // of a block: queries times heads of the group
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Row {
  float top = -kInfinity;  // largest score so far
  float sum = 0.0f;        // of exp(score - top)
  float base() const { return top == -kInfinity ? 0.0f : top; }
};

struct Scratch {
  float *q, *k, *v, *scores, *out;  // [rows, D] [D, kKeys] [kKeys, padded D] [rows, kKeys] [rows, padded D]
  Row* rows;
  KeyRange* ranges;  // per query

  Scratch(int64_t row_count, int64_t queries, int64_t width, int64_t padded) {
    static thread_local std::vector<float> floats;
    static thread_local std::vector<Row> row_storage;
    static thread_local std::vector<KeyRange> range_storage;
    const int64_t sizes[] = {padded * kKeys, kKeys * padded, row_count * kKeys, row_count * padded, row_count * width};
    int64_t total = kMostLanes;
    for (int64_t size : sizes) total += size;
    if (static_cast<int64_t>(floats.size()) < total) floats.resize(static_cast<size_t>(total));
    if (static_cast<int64_t>(row_storage.size()) < row_count) row_storage.resize(static_cast<size_t>(row_count));
    if (static_cast<int64_t>(range_storage.size()) < queries) range_storage.resize(static_cast<size_t>(queries));
    float* next = floats.data();
    while (reinterpret_cast<uintptr_t>(next) % (kMostLanes * sizeof(float))) ++next;
    k = next;
    v = k + sizes[0];
    scores = v + sizes[1];
    out = scores + sizes[2];
    q = out + sizes[3];
    rows = row_storage.data();
    ranges = range_storage.data();
  }
};

// Turns a row's scores against one block into weights, those outside [first, last) into 0 whatever they held, and
// returns the factor by which what was summed so far shrinks.
float softmax_block(float* __restrict scores, int first, int last, float scale, float softcap, Row* row) {
  float top = -kInfinity;
  if (softcap > 0.0f) {
    const float inverse = 1.0f / softcap;
    for (int j = 0; j < kKeys; ++j) scores[j] = softcap * tanh(scores[j] * scale * inverse);
    scale = 1.0f;
  }
#pragma omp simd reduction(max : top)
  for (int j = 0; j < kKeys; ++j) {
    const float score = ((j >= first) & (j < last)) ? scores[j] * scale : -kInfinity;
    scores[j] = score;
    top = score > top ? score : top;
  }
  const float before = row->top;
  row->top = std::max(before, top);
  const float base = row->base();
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int j = 0; j < kKeys; ++j) {
    const float weight = exp(scores[j] - base);
    const float kept = ((j >= first) & (j < last)) ? weight : 0.0f;
    scores[j] = kept;
    sum += kept;
  }
  const float factor = before == row->top ? 1.0f : exp(before - base);
  row->sum = mul_add(row->sum, factor, sum);
  return factor;
}

bool all_finite(const float* values, int64_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += values[i] * 0.0f;
  return sum == 0.0f;
}

float sink_of(const AttentionProblem& p, int64_t head) {
  float sink = 0.0f;
  dispatch<bf16, f16, float>(p.sink_dtype, [&]<class T>() { sink = to_float(static_cast<const T*>(p.sink)[head]); });
  return sink;
}

// Where the keys of a block lie: those from `first` to `last`, the others of the block at the first one's place.
void find_keys(const AttentionProblem& p, const Sequence& s, int64_t head, int64_t block, int first, int last,
               int64_t* k_offsets, int64_t* v_offsets) {
  int64_t page = s.k_batch, slot = s.k_first + block + first, entry = 0;
  const int32_t* table = nullptr;
  if (p.page_table) {
    table = p.page_table + s.k_batch * p.page_table_stride;
    entry = (block + first) / p.page_size;
    slot = (block + first) % p.page_size;
    page = table[entry];
  }
  for (int j = first; j < last; ++j) {
    k_offsets[j] = p.k_stride.at(page, slot, head);
    v_offsets[j] = p.v_stride.at(page, slot, head);
    if (++slot == p.page_size && table && j + 1 < last) {
      page = table[++entry];
      slot = 0;
    }
  }
  for (int j = 0; j < first; ++j) k_offsets[j] = k_offsets[first];
}

template <class Q, class KV>
void attend(const AttentionProblem& p, const Sequence& s, int64_t k_head, int64_t query, int64_t queries) {
  const int64_t width = p.head_size, padded = (width + kMostLanes - 1) / kMostLanes * kMostLanes;
  const int64_t group = p.q_heads / p.k_heads, rows = queries * group;
  const Scratch t(rows, queries, width, padded);
  const float scale = p.softmax_scale * (p.k_scale_at ? *p.k_scale_at : p.k_scale);
  const auto q_offset = [&](const AttentionStrides& stride, int64_t row) {
    return stride.at(s.q_batch, s.q_first + query + row / group, k_head * group + row % group);
  };

  for (int64_t r = 0; r < rows; ++r) {
    const Q* q = static_cast<const Q*>(p.q) + q_offset(p.q_stride, r);
    for (int64_t d = 0; d < width; ++d) t.q[r * width + d] = to_float(q[d]);
    t.rows[r] = Row{};
  }
  std::fill_n(t.out, rows * padded, 0.0f);
  for (int64_t i = 0; i < queries; ++i) t.ranges[i] = visible_keys(p, s, query + i);

  const int64_t begin = t.ranges[0].first, end = t.ranges[queries - 1].last;
  for (int64_t block = begin / kKeys * kKeys; block < end; block += kKeys) {
    const int first = static_cast<int>(std::max<int64_t>(begin - block, 0));
    const int last = static_cast<int>(std::min<int64_t>(end - block, kKeys));
    int64_t k_offsets[kKeys], v_offsets[kKeys];
    find_keys(p, s, k_head, block, first, last, k_offsets, v_offsets);
    load_transposed(t.k, kKeys, static_cast<const KV*>(p.k), k_offsets, last, width);
    for (int j = first; j < last; ++j) {
      const KV* v = static_cast<const KV*>(p.v) + v_offsets[j];
      float* line = t.v + j * padded;
      for (int64_t d = 0; d < width; ++d) line[d] = to_float(v[d]);
      for (int64_t d = width; d < padded; ++d) line[d] = 0.0f;
    }

    // The queries that see a key of this block stand together: both ends of their ranges only grow.
    int64_t from = 0, to = queries;
    while (from < to && t.ranges[from].last <= block) ++from;
    while (from < to && t.ranges[to - 1].first >= block + last) --to;
    if (from == to) continue;
    const int64_t row = from * group, count = (to - from) * group;
    std::fill_n(t.scores + row * kKeys, count * kKeys, 0.0f);
    multiply(t.scores + row * kKeys, kKeys, t.q + row * width, width, t.k, kKeys, count, kKeys, width);

    bool all_see_all = true;
    for (int64_t r = row; r < row + count; ++r) {
      const KeyRange& range = t.ranges[r / group];
      const int row_first = static_cast<int>(std::clamp<int64_t>(range.first - block, 0, kKeys));
      const int row_last = static_cast<int>(std::clamp<int64_t>(range.last - block, 0, kKeys));
      all_see_all &= row_first <= first && row_last >= last;
      const float factor = softmax_block(t.scores + r * kKeys, row_first, row_last, scale, p.softcap, &t.rows[r]);
      if (factor != 1.0f)
        for (int64_t d = 0; d < padded; ++d) t.out[r * padded + d] *= factor;
    }
    // A weight of 0 hides a finite value alone: where others may be, each row takes only the keys that it sees.
    if (all_see_all || all_finite(t.v + first * padded, (last - first) * padded)) {
      multiply(t.out + row * padded, padded, t.scores + row * kKeys + first, kKeys, t.v + first * padded, padded, count,
               padded, last - first);
    } else {
      for (int64_t r = row; r < row + count; ++r) {
        const KeyRange& range = t.ranges[r / group];
        const int64_t row_first = std::max<int64_t>(range.first - block, first);
        const int64_t row_last = std::min<int64_t>(range.last - block, last);
        multiply(t.out + r * padded, padded, t.scores + r * kKeys + row_first, kKeys, t.v + row_first * padded, padded,
                 1, padded, row_last - row_first);
      }
    }
  }

  const float v_scale = p.v_scale_at ? *p.v_scale_at : p.v_scale;
  for (int64_t r = 0; r < rows; ++r) {
    Row& state = t.rows[r];
    float factor = v_scale;
    if (p.sink) {
      const float sink = sink_of(p, k_head * group + r % group), before = state.top;
      state.top = std::max(before, sink);
      const float shrink = exp(before - state.base());
      state.sum = state.sum * shrink + exp(sink - state.base());
      factor *= shrink;
    }
    factor = state.sum == 0.0f ? 0.0f : factor / state.sum;
    Q* out = static_cast<Q*>(p.out) + q_offset(p.out_stride, r);
    for (int64_t d = 0; d < width; ++d) out[d] = from_float<Q>(t.out[r * padded + d] * factor);
    if (p.lse) p.lse[q_offset(p.lse_stride, r)] = state.sum == 0.0f ? -kInfinity : state.base() + std::log(state.sum);
  }
}

}  // namespace

void attention(const AttentionProblem& p) {
  if (p.k_heads == 0) return;
  const int64_t block = std::max<int64_t>(kRows / (p.q_heads / p.k_heads), 1);  // queries
  static thread_local std::vector<int64_t> starts;                              // of each sequence's blocks
  starts.assign(1, 0);
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    starts.push_back(starts.back() + (s.q_len + block - 1) / block);
    longest = std::max(longest, s.k_len);
  }
  const int64_t* first_block = starts.data();
  const int64_t rows = std::min(block, p.q_len) * (p.q_heads / p.k_heads);
  const int64_t work = (longest + kKeys) * p.head_size * (rows + 8);
  dispatch<bf16, f16>(p.q_dtype, [&]<class Q>() {
    dispatch<Q, e4m3>(p.kv_dtype, [&]<class KV>() {
      parallel_for(starts.back() * p.k_heads, 1 + (1 << 17) / work, [&](int64_t first, int64_t last) {
        for (int64_t piece = first; piece < last; ++piece) {
          const int64_t at = piece / p.k_heads;
          const int64_t b = std::upper_bound(first_block, first_block + p.batch + 1, at) - first_block - 1;
          const Sequence s = sequence_of(p, b);
          // The last queries see the most keys: their blocks go first, so that the threads end together.
          const int64_t query = (first_block[b + 1] - 1 - at) * block;
          attend<Q, KV>(p, s, piece % p.k_heads, query, std::min(block, s.q_len - query));
        }
      });
    });
  });
}

}  // namespace KESTREL_CPU
