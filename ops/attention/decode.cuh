// Attention of few query rows, one step of decoding or a handful of speculative tokens. A warp takes kTokens keys at a
// time, in turn with the other warps of the block and the splits, and keeps a softmax of its own; a merge at the end.
// S^T = K Q^T by mma.sync: 16 keys on M, up to 8 query rows on N. K comes straight from 16-byte loads, for a dot
// product does not mind the order of its terms (Q is permuted alike). O^T = V^T P^T, P in two parts, as good as fp32.
// With kHeads key heads in a block, a "key" is a (token, head) pair and the mask is block-diagonal; kHeads 0: one key
// head, and as many rows as it has. Bound by memory from about 30 MB on, below it by the latencies of page ids, keys,
// merge.
#pragma once

#include <limits>
#include <type_traits>

#include "kestrel/hopper/cluster.cuh"
#include "kestrel/hopper/fragment.cuh"
#include "kestrel/hopper/numeric.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/warp.cuh"
#include "ops/attention/decode_merge.cuh"
#include "ops/attention/decode_products.cuh"

namespace kestrel::cuda {

template <class Q_, class KV_, int kSize_, int kHeads_, int kBatches_, Merge kMerge_, bool kWhole_, int kMostThreads_>
struct DecodeTile {
  using Q = Q_;
  using KV = KV_;
  using Operand = std::conditional_t<std::is_same_v<KV, e4m3>, f16, KV>;  // of the products
  static constexpr int kSize = kSize_;                                    // head size, rounded up
  static constexpr bool kWhole = kWhole_;                                 // it is the head size
  static constexpr bool kRows = kHeads_ == 0;                             // several rows of one key head
  static constexpr int kHeads = kRows ? 1 : kHeads_;
  static constexpr int kMostRows = kRows ? 8 : kHeads;
  // Of one row the products' eight columns all are: even and odd ones hold different parts of Q and of P instead.
  static constexpr bool kOneRow = !kRows && kHeads == 1;
  static constexpr int kBatches = kBatches_;  // of 16 keys, in a warp's step
  static constexpr int kTokens = kBatches * 16 / kHeads;
  static constexpr int kGroups = (kTokens + kWarp - 1) / kWarp;  // of tokens, of each of which a lane knows one
  static constexpr int kColumns = kRows ? 2 : 1;                 // scores of a key that a thread works on
  // P in f16 beside e4m3 is far finer than a result in bf16; 16-bit values deserve P in two parts, as good as fp32.
  static constexpr bool kTwoParts = sizeof(KV) == 2;
  static constexpr int kQWords = kSize / (kOneRow ? 16 : 8);  // of Q, in a thread
  // Q in shared memory: the registers do not hold it beside 16-bit K, V and sums.
  static constexpr bool kSharedQ = kSize > 128 && sizeof(KV) == 2;
  static constexpr Merge kMerge = kMerge_;
  static constexpr bool kSimple = false;
  static constexpr int kMostThreads = kMostThreads_;
  static constexpr int kRowBytes = kSize * static_cast<int>(sizeof(KV));
  static constexpr int kKWords = kRowBytes / 16, kVWords = kRowBytes / 32;  // of a row, in a thread
  static constexpr int kPiece = sizeof(KV) == 1 && kSize > 64 ? 16 : 8;     // adjacent elements of V in a thread
  static_assert((kGroups == 1 || kHeads == 1) && kRowBytes % 64 == 0);
};

// The tile for one query that sees all keys, in one tile of rows, without sink, softcap or lse: a third less code,
// which counts where few keys run through it once, other kernels between (129 keys of 3 x 64: 2.8 us, 3.6 with all of
// it; 740 of 8 x 128, warm: 4.8 and 5.2).
template <class Tile>
struct Simple : Tile {
  static constexpr bool kSimple = true;
};

// One step's keys and values. Thread l (g = l / 4, t = l % 4) holds of the keys g and g + 8 of a batch the 16-byte
// pieces t, t + 4, ..., and of the values 2t, 2t + 1, 2t + 8, 2t + 9 the pieces g, g + 8, ...
template <class Tile>
struct Step {
  uint32_t k[Tile::kBatches][2][Tile::kKWords] = {}, v[Tile::kBatches][4][Tile::kVWords] = {};
};

// Where the cache holds the tokens of a step, in units of 16 bytes: each lane knows that of one in each group. Tokens
// that do not exist, or whose page does not, stand where another of the group stands; `seen` says which the others are.
template <class Tile>
struct Places {
  uint32_t row[Tile::kGroups];
  unsigned seen[Tile::kGroups];
};

template <class Tile>
class Gather {
 public:
  __device__ __forceinline__ Gather(const DecodeArgs& a, uint32_t lane, int batch, int head)
      : a_(a), lane_(lane), row_(a.table ? batch * a.table_stride : batch), head_(head * a.head) {}

  // Where the page table tells the pages of the lane's tokens; past the end, that of the last.
  __device__ __forceinline__ void entries(int token, uint32_t (&at)[Tile::kGroups]) const {
#pragma unroll
    for (int i = 0; i < Tile::kGroups; ++i) {
      uint32_t entry, slot;
      a_.by_page_size(min(token + i * kWarp + static_cast<int>(lane_), a_.k_len - 1), &entry, &slot);
      at[i] = row_ + entry;
    }
  }
  // Before the wait past the first level cache, where it would be found again after it.
  __device__ __forceinline__ void pages_on_trial(const uint32_t (&at)[Tile::kGroups],
                                                 uint32_t (&pages)[Tile::kGroups]) const {
#pragma unroll
    for (int i = 0; i < Tile::kGroups; ++i) pages[i] = a_.table ? __ldcg(a_.table + at[i]) : row_;
  }
  __device__ __forceinline__ void pages(int token, uint32_t (&pages)[Tile::kGroups]) const {
    uint32_t at[Tile::kGroups];
    entries(token, at);
#pragma unroll
    for (int i = 0; i < Tile::kGroups; ++i) pages[i] = a_.table ? a_.table[at[i]] : row_;
  }
  __device__ __forceinline__ Places<Tile> places(int token, const uint32_t (&pages)[Tile::kGroups], int end) const {
    Places<Tile> places;
#pragma unroll
    for (int i = 0; i < Tile::kGroups; ++i) {
      const int mine = token + i * kWarp + static_cast<int>(lane_);
      uint32_t entry, slot;
      a_.by_page_size(mine, &entry, &slot);
      const bool is =
          (Tile::kTokens % kWarp == 0 || lane_ < Tile::kTokens) && mine < end && pages[i] < uint32_t(a_.pages);
      places.seen[i] = __ballot_sync(~0u, is);
      const int source = is ? lane_ : 31 - __clz(static_cast<int>(places.seen[i]));
      places.row[i] = __shfl_sync(~0u, pages[i] * a_.page + slot * a_.token, source);
    }
    return places;
  }
  __device__ __forceinline__ void load_k(Step<Tile>& step, const Places<Tile>& places) const {
    const uint32_t g = lane_ / 4, t = lane_ % 4;
    const uint32_t mine = head_ + g % Tile::kHeads * a_.head + t;
#pragma unroll
    for (int i = 0; i < Tile::kBatches; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = i * 16 + half * 8, group = key / Tile::kHeads / kWarp;
        const uint32_t at = __shfl_sync(~0u, places.row[group], (key + g) / Tile::kHeads) + mine;
        const char* row = a_.k + uint64_t{at} * 16;
#pragma unroll
        for (int w = 0; w < Tile::kKWords; w += 4)
          load_in_place<4>(&step.k[i][half][w], row + inside(16 * w, 16 * static_cast<int>(t)), places.seen[group]);
      }
  }
  __device__ __forceinline__ void load_v(Step<Tile>& step, const Places<Tile>& places) const {
    constexpr int kWords = Tile::kVWords < 4 ? Tile::kVWords : 4, kBytes = 4 * kWords;
    const uint32_t g = lane_ / 4, t = lane_ % 4;
    const uint32_t mine = head_ + 2 * t % Tile::kHeads * a_.head + g * kBytes / 16;
    const char* base = a_.v + kBytes * g % 16;
#pragma unroll
    for (int i = 0; i < Tile::kBatches; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = i * 16 + half * 8, group = first / Tile::kHeads / kWarp;
        const uint32_t key = first + 2 * t, place = __shfl_sync(~0u, places.row[group], key / Tile::kHeads);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          uint32_t at = place + mine;
          if (odd) at = Tile::kHeads > 1 ? at + a_.head : __shfl_sync(~0u, places.row[group], key + 1) + mine;
          const char* row = base + uint64_t{at} * 16;
#pragma unroll
          for (int w = 0; w < Tile::kVWords; w += kWords)
            load_in_place<kWords>(&step.v[i][2 * half + odd][w],
                                  row + inside(8 * kBytes * (w / kWords), kBytes * static_cast<int>(g)),
                                  places.seen[group]);
        }
      }
  }
  __device__ __forceinline__ void prefetch_step(const Places<Tile>& places) const {
    constexpr int kLine = 128;
    const int bytes = a_.head_size * static_cast<int>(sizeof(typename Tile::KV));
#pragma unroll
    for (int i = 0; i < Tile::kGroups; ++i) {
      if (lane_ >= Tile::kTokens || !places.seen[i]) continue;
#pragma unroll 1
      for (int head = 0; head < Tile::kHeads; ++head)
#pragma unroll 1
        for (int byte = 0; byte < bytes; byte += kLine) {
          const int64_t at = uint64_t{places.row[i] + head_ + head * a_.head} * 16 + byte;
          prefetch(a_.k + at);
          prefetch(a_.v + at);
        }
    }
  }

 private:
  // Where to read the piece of a row that lies `at` after the thread's first, which is at `first`: past the end of a
  // shorter head, at its beginning (zeros in q, or nobody, meets what is read there).
  __device__ __forceinline__ int inside(int at, int first) const {
    if (Tile::kWhole || at + first < a_.head_size * static_cast<int>(sizeof(typename Tile::KV))) return at;
    return -first;
  }

  const DecodeArgs& a_;
  uint32_t lane_;
  uint32_t row_;   // of the table
  uint32_t head_;  // where it begins in a token
};

// c tanh(x / c) by exponential and reciprocal: an absolute error of 2e-7 c.
__device__ __forceinline__ float cap(float x, float c) {
  return c - 2.0f * c * fast_reciprocal(1.0f + fast_exp2(x * (2.88539008f / c)));
}

// The keys that a query sees, as visible_keys() of problem.h says.
__device__ __forceinline__ Range visible(const DecodeArgs& a, int length, int prefix, int query) {
  const int position = query + length - a.q_len;
  int first = 0, last = length;
  if (a.has(a.kCausal)) last = position + 1;
  if (a.has(a.kPrefix) && prefix >= 0 && position < prefix) last = min(prefix, length);
  if (a.has(a.kWindow)) {
    if (a.window_left >= 0) first = max(first, position - a.window_left);
    if (a.window_right >= 0) last = min(last, position + a.window_right + 1);
  }
  return {first, max(first, last)};
}

__device__ __forceinline__ int prefix_of(const DecodeArgs& a, int batch) {
  if (!a.has(a.kPrefix)) return -1;
  return a.prefix_lens ? __ldcg(a.prefix_lens + batch) : a.prefix_len;
}

// What binds where a target is missed (us): 32 heads of 64 in bf16, 8192 keys, 18.4. Waiting first, keys cross L2
// twice; the first are there 3.8 after the wait, warps of equal shares end between 10 and 17, and the last merge
// takes 2.6: its fence, atomic and loads are three trips to L2.
template <class Tile>
__global__ void __launch_bounds__(Tile::kMostThreads) decode_kernel(const __grid_constant__ DecodeArgs args) {
  std::conditional_t<Tile::kSimple, DecodeArgs, const DecodeArgs&> a = args;
  if constexpr (Tile::kSimple) a.features &= a.kScales, a.q_len = 1;
  constexpr Merge kMerge = Tile::kMerge;
  constexpr int kBatches = Tile::kBatches, kTokens = Tile::kTokens, kColumns = Tile::kColumns;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if constexpr (kMerge == Merge::kCluster) cluster_begun_arrive();
  // Scales are as good as weights: nothing writes them during the run.
  const float k_scale = a.has(a.kScales) && a.k_scale_at ? *a.k_scale_at : 1.0f;

  bool waited = false;
  const auto wait = [&] {
    wait_for_predecessor();
    release_successor();
    waited = true;
  };
  const uint32_t thread = this_thread(), lane = thread % kWarp, g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(__shfl_sync(~0u, thread / kWarp, 0)), warp_keys = blockDim.x / kWarp * kTokens;
  Item item{};
  Rows<Tile> rows{};
  const typename Tile::Q* q_row = nullptr;
  int stride = 0, token = 0;
  uint32_t entries[2][Tile::kGroups] = {};
  const auto prepare = [&] {
    rows = Rows<Tile>(a, item.group);
    uint32_t query, head;
    rows.find(a, g % Tile::kMostRows, &query, &head);
    q_row = static_cast<const typename Tile::Q*>(a.q) + uint64_t{a.q_batch} * item.batch + uint64_t{a.q_head} * head;
    if (Tile::kRows && a.q_len > 1) q_row += uint64_t{a.q_token} * query;
    stride = warp_keys * item.splits;
    token = (warp * item.splits + item.split) * kTokens;
    const Gather<Tile> gather(a, lane, item.batch, rows.head);
    gather.entries(token, entries[0]);
    gather.entries(token + stride, entries[1]);
    compute_now(q_row);
    if (Tile::kWhole || t * (Tile::kSize / 4) < a.head_size) prefetch(q_row + t * (Tile::kSize / 4));
  };
  if constexpr (kMerge != Merge::kGrid) {
    find_item<kMerge>(a, &item);
    prepare();
  }
  int length, prefix, end;
  Places<Tile> here{};
  uint32_t pages[2][Tile::kGroups], q_words[Tile::kSize / 8];
  Step<Tile> step;
  // What the predecessor may be writing is read before the wait on trial only, to have the keys in L2 by then. After
  // it, they are loaded from where they were found while lengths and pages are read again: if these changed, once more.
  for (;;) {
    if constexpr (kMerge == Merge::kGrid) {
      if (!find_item<kMerge>(a, &item)) {
        if (waited) return;
        wait();
        if (a.fresh >= 0) return;
        continue;
      }
      prepare();
    }
    const Gather<Tile> gather(a, lane, item.batch, rows.head);
    if (a.has(a.kWindow)) {  // without a window, the first pages do not wait for the length
      token = (warp * item.splits + item.split) * kTokens +
              visible(a, length_of(a, stored_length(a, item.batch)), prefix_of(a, item.batch), rows.query(a, 0)).first;
      gather.entries(token, entries[0]);
      gather.entries(token + stride, entries[1]);
    }
    gather.pages_on_trial(entries[0], pages[0]);
    gather.pages_on_trial(entries[1], pages[1]);
    const int stored = stored_length(a, item.batch);
    length = length_of(a, stored);
    prefix = prefix_of(a, item.batch);
    end = visible(a, length, prefix, Tile::kRows ? rows.query(a, Tile::kMostRows) : 0).last;
    here = gather.places(token, pages[0], end);
    bool on_trial = false;
    if (!waited && (a.fresh < 0 || (token < end && token + kTokens > length - a.fresh))) {
      gather.prefetch_step(here);
      wait();
      on_trial = a.fresh < 0;
      // Another plan, perhaps, or another first key.
      if (on_trial && (a.has(a.kWindow) || (kMerge == Merge::kGrid && a.splits_vary()))) continue;
    }
    // What the keys are used with is asked for before them where it may be: the loads of an SM come one after another.
    uint32_t pages_again[2][Tile::kGroups];
    int stored_again = stored, prefix_again = prefix;
    if (on_trial) {
      load_q<Tile>(q_words, q_row, t, a.head_size);
      gather.pages_on_trial(entries[0], pages_again[0]);
      gather.pages_on_trial(entries[1], pages_again[1]);
      stored_again = stored_length(a, item.batch);
      prefix_again = prefix_of(a, item.batch);
    }
    gather.load_k(step, here);
    gather.load_v(step, here);
    if (!waited) wait();
    if (!on_trial) {
      load_q<Tile>(q_words, q_row, t, a.head_size);
      break;
    }
    bool same = (stored_again == stored) & (prefix_again == prefix);
#pragma unroll
    for (int i = 0; i < Tile::kGroups; ++i)
      same &= (pages_again[0][i] == pages[0][i]) & (pages_again[1][i] == pages[1][i]);
    // If not, nothing may stay of the values found on trial: where no key is, none are loaded, and those may be NaN.
    if (__all_sync(~0u, same)) break;
#pragma unroll
    for (auto& of_batch : step.v)
#pragma unroll
      for (auto& row : of_batch)
#pragma unroll
        for (uint32_t& word : row) clear_in_place(word);
  }
  if (kMerge == Merge::kGrid && thread == 0) shared_item() = item;  // it would take registers from the loop
  Query<Tile> q;
  convert_q<Tile>(q, q_words, g % 2);

  float out[Tile::kSize / 16][4] = {}, top[kColumns], sum[kColumns];
#pragma unroll
  for (int u = 0; u < kColumns; ++u) top[u] = -kInfinity, sum[u] = 0.0f;
  const bool odd = Tile::kHeads > 1 && g % 2;  // the head of the thread's keys is the second of its two columns
  if (token < end) {
    const Gather<Tile> gather(a, lane, item.batch, rows.head);
    Range columns[kColumns];  // what the thread's own rows see, where they differ
    if (Tile::kRows && a.q_len > 1) {
#pragma unroll
      for (int u = 0; u < kColumns; ++u) {
        columns[u] = visible(a, length, prefix, rows.query(a, 2 * t + u));
      }
    }
    const float score_scale = a.score_scale * k_scale;
    const bool mine = 2 * t % Tile::kHeads / 2 == g % Tile::kHeads / 2;

    bool more;
    do {
      const int next = token + stride;
      more = next < end;
      const Places<Tile> next_places = gather.places(next, pages[1], end);
      gather.pages(next + stride, pages[1]);

      float scores[kBatches][2][kColumns];
#pragma unroll
      for (int i = 0; i < kBatches; ++i) {
        float sums[4] = {};
        if constexpr (!Tile::kOneRow) multiply_k<Tile>(sums, step.k[i][0], step.k[i][1], q);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if constexpr (Tile::kRows) {
            scores[i][half][0] = sums[2 * half];
            scores[i][half][kColumns - 1] = sums[2 * half + 1];
          } else if constexpr (Tile::kOneRow) {
            scores[i][half][0] = multiply_k<Tile>(step.k[i][half], q);
          } else {
            scores[i][half][0] = odd ? sums[2 * half + 1] : sums[2 * half];
          }
        }
      }
      gather.load_k(step, next_places);
      __syncwarp();

#pragma unroll
      for (auto& of_batch : scores)
#pragma unroll
        for (auto& of_key : of_batch)
#pragma unroll
          for (float& score : of_key) score *= score_scale;
      if (a.has(a.kSoftcap)) {
#pragma unroll
        for (auto& of_batch : scores)
#pragma unroll
          for (auto& of_key : of_batch)
#pragma unroll
            for (float& score : of_key) score = cap(score, a.softcap) * 1.44269504f;
      }
      unsigned bits[Tile::kGroups];
#pragma unroll
      for (int i = 0; i < Tile::kGroups; ++i) bits[i] = mine ? here.seen[i] >> g / Tile::kHeads : 0;
#pragma unroll
      for (int i = 0; i < kBatches; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int first = (i * 16 + half * 8) / Tile::kHeads;
          if (bits[first / kWarp] >> first % kWarp & 1) continue;
#pragma unroll
          for (float& score : scores[i][half]) score = -kInfinity;
        }
      if (Tile::kRows && a.q_len > 1) {
#pragma unroll
        for (int i = 0; i < kBatches; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int u = 0; u < kColumns; ++u) {
              const int key = token + i * 16 + half * 8 + static_cast<int>(g);
              if (key < columns[u].first || key >= columns[u].last) scores[i][half][u] = -kInfinity;
            }
      }

      float shrink[2], base[kColumns];
#pragma unroll
      for (int u = 0; u < kColumns; ++u) {
        float most = top[u];
#pragma unroll
        for (int i = 0; i < kBatches; ++i) most = fmaxf(most, fmaxf(scores[i][0][u], scores[i][1][u]));
        if (Tile::kHeads == 1) most = fmaxf(most, shuffle_xor(most, 4));
        most = fmaxf(most, shuffle_xor(most, 8));
        most = fmaxf(most, shuffle_xor(most, 16));
        base[u] = base_of(most);
        shrink[u] = fast_exp2(top[u] - base[u]);
        top[u] = most;
        sum[u] *= shrink[u];
      }
      if constexpr (!Tile::kRows) {
        const float other = Tile::kHeads > 1 ? shuffle_xor(shrink[0], 4) : shrink[0], own = shrink[0];
        shrink[0] = odd ? other : own;
        shrink[1] = odd ? own : other;
      }
      if (__any_sync(~0u, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (auto& o : out) o[0] *= shrink[0], o[1] *= shrink[1], o[2] *= shrink[0], o[3] *= shrink[1];
      }
#pragma unroll
      for (int i = 0; i < kBatches; ++i) {
        uint32_t p[2], rest[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float weights[2];
          if constexpr (Tile::kRows) {
#pragma unroll
            for (int u = 0; u < 2; ++u) {
              weights[u] = fast_exp2(scores[i][half][u] - base[u]);
              sum[u] += weights[u];
            }
          } else {
            const float weight = fast_exp2(scores[i][half][0] - base[0]);
            sum[0] += weight;
            weights[0] = odd ? 0.0f : weight;
            weights[1] = odd ? weight : 0.0f;
          }
          using T = typename Tile::Operand;
          uint32_t rounded = from_float2<T>(weights[0], weights[1]);
          if constexpr (Tile::kTwoParts) {
            const float2 back = to_float2<T>(rounded);
            if constexpr (Tile::kOneRow)
              rounded = from_float2<T>(weights[0], weights[0] - back.x);
            else
              rest[half] = transpose_8x8(from_float2<T>(weights[0] - back.x, weights[1] - back.y));
          }
          p[half] = transpose_8x8(rounded);
        }
        multiply_v<Tile>(out, step.v[i], p, rest);
      }
      gather.load_v(step, next_places);
#pragma unroll
      for (int i = 0; i < Tile::kGroups; ++i) here.seen[i] = next_places.seen[i];
      token = next;
    } while (more);
#pragma unroll
    for (int u = 0; u < kColumns; ++u) {
      if (Tile::kHeads == 1) sum[u] += shuffle_xor(sum[u], 4);
      sum[u] += shuffle_xor(sum[u], 8);
      sum[u] += shuffle_xor(sum[u], 16);
    }
  }
  if constexpr (Tile::kOneRow && Tile::kTwoParts)
#pragma unroll
    for (auto& o : out) o[0] += o[1], o[2] += o[3];
  merge_block<Tile>(a, out, top, sum);
}

}  // namespace kestrel::cuda
