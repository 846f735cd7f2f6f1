// FlashAttention (Dao et al. 2022, Shah et al. 2024) of many queries: out = softmax(q k^T) v. A block has one loading
// warpgroup and up to four of 64 queries each. A group issues S = q k[j]^T and then O += P v[j + 1] at once, turns S
// into the next P while the products of the other groups run, and walks its keys downwards: first the tiles that the
// mask's right edge cuts, then whole ones, then those cut by a window's left edge; the others it never touches.
// In shared memory q's place later takes the output, for whole lines to the device's memory.
// At head size 64 bound by a group's own instructions (158 a step; with 195, 4096 keys took 139 us instead of 127).
#pragma once

#include "kestrel/hopper/mma.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/wgmma.cuh"
#include "kestrel/launch.h"
#include "ops/attention/prefill_rows.cuh"
#include "ops/attention/prefill_softmax.cuh"

namespace kestrel::cuda {

constexpr int kStartBarrier = 13;  // 1 to 4, 8 to 11: see Group; 12: the row loader's

// One group's accumulators and its place in the ring.
template <class Tile>
struct Group {
  static constexpr int kOut = Tile::kOutColumns / 2;
  using T = typename Tile::T;
  using Out = typename Tile::Out;

  const PrefillArgs& a;
  const PrefillShared<Tile> shared;
  const int index, thread;  // group of the block, thread of the group
  const int next_turn;
  using Stage = Place<Tile::kStages>;
  Stage next;
  Place<Tile::kQuerySlots> slot;

  __device__ __forceinline__ int warp() const { return thread / 32; }
  // Of a thread's first score: see wgmma.cuh.
  static __device__ __forceinline__ int row_of(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
  static __device__ __forceinline__ int column_of(int thread) { return 2 * (thread % 4); }
  __device__ __forceinline__ void sync() const { sync_threads(8 + index, kGroupThreads); }
  __device__ __forceinline__ bool turns() const { return !Tile::kLarge && a.turns; }
  // Named barriers 1 to 4: the group whose turn it is to issue products.
  __device__ __forceinline__ void wait_turn() const {
    if (turns()) sync_threads(1 + index, 2 * kGroupThreads);
  }
  __device__ __forceinline__ void pass_turn() const {
    if (turns()) arrive_threads(next_turn, 2 * kGroupThreads);
  }
  __device__ __forceinline__ void wait(Stage at) const { wait_barrier(shared.full(at.stage()), at.parity()); }
  __device__ __forceinline__ void release() {
    if (thread % 32 == 0) arrive(shared.empty(next.stage()));  // each warp by itself: see score_again
    next = next.next();
  }
  // A stage that other groups of the block need.
  __device__ __forceinline__ void skip(bool in_turn) {
    wait(next);
    __syncwarp();  // or the arrivals of the first lane may leave others behind, until the barrier is two phases on
    release();
    if (in_turn) {
      wait_turn();
      pass_turn();
    }
  }

  __device__ __forceinline__ void issue_scores(float (&s)[kScores], Stage at) const {
    constexpr int kPanelSteps = Tile::kPanelColumns / 16;
    const uint64_t q = k_major<Tile::kSpan>(shared.query(slot.stage(), index));
    const uint64_t k = shift(k_major<Tile::kSpan>(shared.keys(0)), at.stage() * (Tile::kTileBytes >> 4));
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      const uint32_t units = step / kPanelSteps * (Tile::kPanelBytes >> 4) + step % kPanelSteps * 2;
      wgmma<T, kTileRows>(s, shift(q, units), shift(k, units), step > 0);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_values(float (&o)[kOut], const uint32_t (&p)[kTileRows / 16][4],
                                               Stage at) const {
    // The panel of ones stays where it is while the values' descriptor moves on.
    constexpr uint32_t kMove = Tile::kOnesPanel ? 1u - (1u << 16) : 1u;
    const uint32_t values = shared.values(0);
    const uint32_t panel = Tile::kOnesPanel ? shared.ones() - values : Tile::kPanelBytes;
    const uint64_t v = shift(mn_major<Tile::kSpan>(values, panel), at.stage() * (Tile::kTileBytes >> 4) * kMove);
#pragma unroll
    for (int step = 0; step < kTileRows / 16; ++step)
      wgmma<T, Tile::kOutColumns, true>(o, p[step], shift(v, step * Tile::kSpan * kMove), true);
    wgmma_commit();
  }

  // A warp's scores once more, by mma.sync from the same tiles.
  __device__ __forceinline__ void score_again(float (&s)[kScores], Stage at) const {
    int lane = thread;
    compute_now(lane);
    constexpr int kEight = 8 * Tile::kSpan;  // rows
    const int line = lane % 32 / 4, part = lane % 4 * 4;
    const uint32_t q = shared.query(slot.stage(), index) + lane / 32 * 2 * kEight + part;
    const uint32_t k = shared.keys(at.stage()) + part;
#pragma unroll
    for (float& x : s) x = 0.0f;
#pragma unroll 1
    for (int step = 0; step < Tile::kSteps; ++step) {
      const uint32_t low = tile_offset<Tile>(line, 2 * step), high = tile_offset<Tile>(line, 2 * step + 1);
      const uint32_t query[4] = {load_shared_word(q + low), load_shared_word(q + low + kEight),
                                 load_shared_word(q + high), load_shared_word(q + high + kEight)};
#pragma unroll
      for (int j = 0; j < kTileRows / 8; ++j)
        mma<T>(reinterpret_cast<float(&)[4]>(s[4 * j]), query[0], query[1], query[2], query[3],
               load_shared_word(k + j * kEight + low), load_shared_word(k + j * kEight + high));
    }
  }

  // Keys of pages that are none: nobody sees them. To be asked before the stage of keys is released.
  __device__ __forceinline__ uint2 missing_rows(Stage at) const {
    if constexpr (Tile::kBoxes) return {0, 0};
    return *reinterpret_cast<const uint2*>(shared.missing(at.stage()));
  }
  __device__ __forceinline__ bool any_missing(Stage at) const {
    const uint2 rows = missing_rows(at);
    return !Tile::kBoxes && warp_uniform(rows.x | rows.y) != 0;
  }
  __device__ __forceinline__ void mask_missing(float (&s)[kScores], Stage at) const {
    const uint2 rows = missing_rows(at);
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int row = i / 4 * 8 % 32 + i % 2 + column_of(thread);
      if ((i < kScores / 2 ? rows.x : rows.y) >> row & 1) s[i] = -INFINITY;
    }
  }

  // Rows past the sequence's queries may be another's, or NaN. As zeros, they sway no vote of their warp: a sequence's
  // bits do not depend on what stands behind it.
  __device__ __forceinline__ void clean_queries(const Plan& plan) const {
    const int count = plan.s.q_len - plan.row[index];
    if (count >= kTileRows) return;
    const uint32_t at = shared.query(slot.stage(), index);
    constexpr int kChunks = Tile::kSpan / 16;
    for (int i = count * kChunks + thread; i < kTileRows * kChunks; i += kGroupThreads)
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel)
        store_shared(at + panel * Tile::kPanelBytes + i * 16, uint4{0, 0, 0, 0});
    fence_shared_writes();
    sync();
  }

  // Weights of 0 do not hide NaN: rows of values past the sequence's keys become zeros. Every group writes them all.
  __device__ __forceinline__ void clean_values(int first, Stage place) const {
    wait(place);
    const uint32_t at = shared.values(place.stage());
    constexpr int kChunks = Tile::kHead / 8;
    for (int i = first * kChunks + thread; i < kTileRows * kChunks; i += kGroupThreads)
      store_shared(at + tile_offset<Tile>(i / kChunks, i % kChunks), uint4{0, 0, 0, 0});
    fence_shared_writes();
    sync();
  }

  // Rows that threads have brought, unlike boxes, are seen by wgmma after a fence of the reader's alone. (A fence of
  // the loader's would wait for all of its copies that are under way.)
  __device__ __forceinline__ void see_copies() const {
    if constexpr (!Tile::kBoxes) fence_shared_writes();
  }

  // Queries for f16 products. Those of bf16 that f16 cannot hold are far from usual: they stay at its largest number.
  __device__ __forceinline__ void convert_queries(const Plan& plan) const {
    const AttentionProblem& p = a.problem;
    constexpr int kChunks = Tile::kHead / 8;
    const int count = plan.s.q_len - plan.row[index], chunks = static_cast<int>(p.head_size) / 8;
    const Out* from =
        static_cast<const Out*>(p.q) + p.q_stride.at(plan.q_batch, plan.s.q_first + plan.row[index], plan.head);
    constexpr int kEach = (kTileRows * kChunks + kGroupThreads - 1) / kGroupThreads;
    Vec<Out, 8> v[kEach] = {};
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int i = n * kGroupThreads + thread, line = i / kChunks, chunk = i % kChunks;
      if (line < count && chunk < chunks) v[n] = load<8>(from + line * p.q_stride.token + chunk * 8);
    }
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int i = n * kGroupThreads + thread;
      if (i >= kTileRows * kChunks) break;
      float values[8];
      to_floats(v[n], values);  // NaN stays
#pragma unroll
      for (float& x : values) x = fabsf(x) > 65504.0f ? copysignf(65504.0f, x) : x;
      const Vec<T, 8> halves =
          std::is_same_v<Out, T> ? reinterpret_cast<const Vec<T, 8>&>(v[n]) : from_floats<T>(values);
      store_shared(shared.query(slot.stage(), index) + tile_offset<Tile>(i / kChunks, i % kChunks),
                   {halves.words[0], halves.words[1], halves.words[2], halves.words[3]});
    }
    fence_shared_writes();
    sync();
  }

  __device__ __forceinline__ void attend(const Plan& plan) {
    const AttentionProblem& p = a.problem;
    const KeyTiles mine{warp_uniform(plan.keys[index].first), warp_uniform(plan.keys[index].last),
                        warp_uniform(plan.keys[index].clear_first), warp_uniform(plan.keys[index].clear_last)};
    float s[kScores], o[kOut], shrink[2];
    uint32_t weights[kTileRows / 16][4];
    Rows2 rows;
    float scale = p.softmax_scale * (p.k_scale_at ? *p.k_scale_at : p.k_scale);
    const Transform transform{p.softcap,
                              p.softcap > 0.0f ? scale * (2.0f * kLog2e) * fast_reciprocal(p.softcap) : scale};
    const bool transforms = p.softcap > 0.0f || !(scale > 0.0f);
    scale = transforms ? kLog2e : scale * kLog2e;

    const auto mask = [&](int tile) {
      int lane = thread;
      compute_now(lane);  // or what follows from it would take registers throughout
      int from[2], to[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Range range =
            visible(p, plan.s.q_len, plan.s.k_len, plan.s.prefix, plan.row[index] + row_of(lane) + 8 * r);
        from[r] = range.first - tile * kTileRows - column_of(lane);
        to[r] = range.last - tile * kTileRows - column_of(lane);
      }
      mask_scores(s, from, to);
    };

    int tile = warp_uniform(plan.last) - 1;
    for (; tile >= mine.last; --tile) skip(true);
#pragma unroll
    for (int i = 0; i < kOut; ++i) o[i] = 0.0f;
    if constexpr (Tile::kSource == KeySource::kE4m3Rows) convert_queries(plan);
    wait_barrier(shared.query_full(slot.stage()), slot.parity());
    if (Tile::kSource != KeySource::kE4m3Rows && p.cu_seqlens_q) clean_queries(plan);
    wait(next);
    see_copies();
    wgmma_fence();
    issue_scores(s, next);
    wgmma_wait<0>();
    if (transforms) transform(s);
    mask(tile);
    if (any_missing(next)) mask_missing(s, next);
    raise_reference(s, rows, shrink, scale);
    release();  // after a vote on what was read there: an arrival may overtake a load
    const float2 first_sums = weigh<!Tile::kSumsByProduct>(s, rows, scale, p.lse);
    rows.sum[0] = first_sums.x;
    rows.sum[1] = first_sums.y;
    pack_weights<T>(weights, s);
    if (a.unclean && (tile + 1) * kTileRows > plan.s.k_len) clean_values(plan.s.k_len - tile * kTileRows, next);

    // Each step adds the last weights' product and turns the next scores into weights. The bet is that none of them
    // passes 2^8. Whether it was lost shows on packed weights, at half the cost of looking for the largest score. What
    // is rare stands apart, so that the usual steps are one short piece of code.
    bool ready = false;  // whether the stage is known to be full
    const auto products = [&] {
      if (!ready) wait(next);
      see_copies();
      wait_turn();
      wgmma_fence();
      issue_scores(s, next);
      issue_values(o, weights, next);
      pass_turn();
      const bool missing = any_missing(next);
      // Exponentials beside the product with the values cost 12% at 4096 keys of head size 64.
      wgmma_wait<0>();
      const Stage then = next.next();  // asked for early: the answer takes its time
      ready = test_barrier(shared.full(then.stage()), then.parity());
      return missing;
    };
    const bool special = transforms || p.lse;
    for (--tile; tile >= mine.first; --tile) {
      uint2 largest;
      float2 sums;
      bool lost;
      const bool masked = tile >= mine.clear_last || tile < mine.clear_first;
      bool usual = Tile::kHead <= 128 && !special && !masked, missing = false;
      if (usual) {
#pragma unroll 1
        for (;; --tile) {
          missing = products();
          if (missing) break;
          sums = weigh<!Tile::kSumsByProduct>(s, rows, scale, false);
          pack_weights<T>(weights, s);
          largest = largest_weights<T>(weights);
          lost = any_above<T, WeightBits<T>::kLimit>(largest);
          if (lost || tile == mine.clear_first) break;
          rows.sum[0] += sums.x;
          rows.sum[1] += sums.y;
          release();
        }
        usual = !missing;
      } else {
        missing = products();
      }
      const auto weigh_again = [&](bool raise) {
        if (transforms) transform(s);
        if (masked) mask(tile);
        if (missing) mask_missing(s, next);
        if (raise) raise_reference(s, rows, shrink, scale);
        sums = weigh<!Tile::kSumsByProduct>(s, rows, scale, p.lse);
        pack_weights<T>(weights, s);
      };
      if (!usual) {
        weigh_again(false);
        largest = largest_weights<T>(weights);
        lost = any_above<T, WeightBits<T>::kLimit>(largest);
      }
      if (lost) {
        if (any_above<T, WeightBits<T>::kMost>(largest)) {
          score_again(s, next);
          weigh_again(true);
        } else {
          lower_weights<T>(weights, largest, rows, shrink);
          sums.x *= shrink[0];
          sums.y *= shrink[1];
        }
#pragma unroll
        for (int i = 0; i < kOut; ++i) o[i] *= shrink[i / 2 % 2];
      }
      rows.sum[0] += sums.x;
      rows.sum[1] += sums.y;
      release();
    }
    wait(next);
    see_copies();
    wgmma_fence();
    issue_values(o, weights, next);
    // Beside the last product: where the rows go, and all of their factors but the sums. The sink may lie far above the
    // reference, or the reference be none.
    const int first_query = plan.row[index];
    Out* out = static_cast<Out*>(p.out) + p.out_stride.at(plan.q_batch, plan.s.q_first + first_query, plan.head);
    compute_now(out);
    const float sink = p.sink ? sink_of(p, plan.head) * kLog2e : -INFINITY;
    float base[2], share[2], v_scale = p.v_scale_at ? *p.v_scale_at : p.v_scale;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top = fmaxf(rows.reference[r], sink);
      base[r] = top <= kNoReference ? 0.0f : top;
      shrink[r] = fast_exp2(rows.reference[r] - base[r]), share[r] = fast_exp2(sink - base[r]);
      compute_now(shrink[r]), compute_now(share[r]);
    }
    compute_now(v_scale);
    wgmma_wait<0>();
    release();
    for (; tile >= warp_uniform(plan.first); --tile) skip(true);

    float exact[2];  // sums of weights that were not rounded
    if (!Tile::kSumsByProduct || p.lse)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        exact[r] = rows.sum[r] + shuffle_xor(rows.sum[r], 1);
        exact[r] += shuffle_xor(exact[r], 2);
      }
    const int queries = plan.s.q_len - first_query;
    if (p.lse && thread % 4 == 0)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = row_of(thread) + 8 * r;
        const float sum = fmaf(exact[r], shrink[r], share[r]);
        if (query < queries)
          p.lse[p.lse_stride.at(plan.q_batch, plan.s.q_first + first_query + query, plan.head)] =
              sum == 0.0f ? -INFINITY : fmaf(base[r], kLn2, logf(sum));
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = fmaf(Tile::kSumsByProduct ? o[kOut - 4 + 2 * r] : exact[r], shrink[r], share[r]);
      const float factor = sum == 0.0f ? 0.0f : shrink[r] * v_scale * fast_reciprocal(sum);
#pragma unroll
      for (int i = 2 * r; i < Tile::kHead / 2; i += 4) o[i] *= factor, o[i + 1] *= factor;
    }

    // Through q's place: all of the group's products have read it.
    sync();
    const uint32_t place = shared.query(slot.stage(), index);
    const int lane = thread % 32;
#pragma unroll
    for (int j = 0; j < Tile::kHead / 16; ++j) {
      const int line = 16 * warp() + lane % 16, chunk = 2 * j + lane / 16;
      store_matrices(place + tile_offset<Tile>(line, chunk), from_float2<Out>(o[8 * j], o[8 * j + 1]),
                     from_float2<Out>(o[8 * j + 2], o[8 * j + 3]), from_float2<Out>(o[8 * j + 4], o[8 * j + 5]),
                     from_float2<Out>(o[8 * j + 6], o[8 * j + 7]));
    }
    if constexpr (Tile::kHead % 16 != 0) {
      constexpr int kLast = Tile::kHead / 8 - 1, kAt = Tile::kHead / 16 * 8;
      const int line = 16 * warp() + lane % 16;
      store_matrices(place + tile_offset<Tile>(line, kLast), from_float2<Out>(o[kAt], o[kAt + 1]),
                     from_float2<Out>(o[kAt + 2], o[kAt + 3]));
    }
    __syncwarp();
    constexpr int kChunks = Tile::kHead / 8;  // of 16 bytes, in a line
    const int columns = static_cast<int>(p.head_size);
    int first = lane;
    if constexpr (Tile::kNarrow) compute_now(first);  // or its quotients would take registers throughout
#pragma unroll
    for (int i = first; i < 16 * kChunks; i += 32) {
      const int line = 16 * warp() + i / kChunks, chunk = i % kChunks;
      const uint4 v = load_shared(place + tile_offset<Tile>(line, chunk));
      if (line < queries && chunk * 8 < columns)
        *reinterpret_cast<uint4*>(out + line * p.out_stride.token + chunk * 8) = v;
    }
  }

  // Queries that see no key, where the block may have no place in shared memory for them.
  __device__ __forceinline__ void write_empty(const Plan& plan) const {
    const AttentionProblem& p = a.problem;
    const int first_query = plan.row[index];
    const int count = min(plan.s.q_len - first_query, kTileRows), chunks = p.head_size / 8;
    Out* out = static_cast<Out*>(p.out) + p.out_stride.at(plan.q_batch, plan.s.q_first + first_query, plan.head);
    for (int i = thread; i < count * chunks; i += kGroupThreads)
      *reinterpret_cast<uint4*>(out + i / chunks * p.out_stride.token + i % chunks * 8) = uint4{0, 0, 0, 0};
    if (p.lse && thread < count)
      p.lse[p.lse_stride.at(plan.q_batch, plan.s.q_first + first_query + thread, plan.head)] =
          p.sink ? sink_of(p, plan.head) : -INFINITY;
  }
};

template <class Tile>
__device__ __forceinline__ void run_group(const PrefillArgs& a, const PrefillShared<Tile>& shared) {
  const int index = warp_uniform(static_cast<int>(threadIdx.x / kGroupThreads));
  Group<Tile> group{a, shared, index, static_cast<int>(threadIdx.x % kGroupThreads), (index + 1) % a.groups + 1};
  if (group.turns() && group.index + 1 == a.groups) arrive_threads(1, 2 * kGroupThreads);
  for (;;) {
    const Place<Tile::kQuerySlots> slot = group.slot;
    wait_barrier(shared.plan_full(slot.stage()), slot.parity());
    const Plan& plan = *shared.plan(slot.stage());
    if (warp_uniform(plan.head) < 0) return;
    if (warp_uniform(plan.keys[group.index].first < plan.keys[group.index].last)) {
      group.attend(plan);
    } else {
      const int count = warp_uniform(plan.last - plan.first);
      for (int i = 0; count > 0 && i <= count; ++i) group.skip(i > 0 && i < count);
      group.write_empty(plan);
    }
    if (a.once) return;
    fence_shared_writes();
    group.sync();
    if (group.thread == 0) arrive(shared.query_empty(slot.stage()));
    group.slot = slot.next();
  }
}

// What no copy writes: columns of ones beside the values, zeros past the columns of keys and queries. By the groups.
template <class Tile>
__device__ __forceinline__ void fill_constants(const PrefillShared<Tile>& shared, uint32_t threads) {
  constexpr uint32_t kOne = dtype_of<typename Tile::T> == DType::kBF16 ? 0x3f803f80 : 0x3c003c00;
  const uint4 kOnes = {kOne, kOne, kOne, kOne}, kZeros = {0, 0, 0, 0};
  if constexpr (Tile::kOnesPanel) {
    for (uint32_t i = threadIdx.x; i < Tile::kOnesBytes / 16; i += threads) store_shared(shared.ones() + 16 * i, kOnes);
  } else if constexpr (Tile::kHead % 16 != 0) {
    // All tiles lie one after another: of queries, of keys, of values.
    constexpr int kZeroTiles = Tile::kQuerySlots * Tile::kGroups + Tile::kStages;
    constexpr int kTiles = kZeroTiles + (Tile::kSumsByProduct ? Tile::kStages : 0);
    for (uint32_t i = threadIdx.x; i < kTiles * kTileRows; i += threads) {
      const uint32_t tile = i / kTileRows, line = i % kTileRows;
      store_shared(shared.base + tile * Tile::kTileBytes + tile_offset<Tile>(line, Tile::kHead / 8),
                   tile < kZeroTiles ? kZeros : kOnes);
    }
  }
}

// By one thread: of several lanes each would come on its own, with a fence before it.
template <class Tile>
__device__ __forceinline__ void init_barriers(const PrefillShared<Tile>& shared, uint32_t groups) {
  // Who says that a stage is full: the copy engine, each copying thread and each of its warps, or each converting warp.
  constexpr uint32_t kWarps = kGroupThreads / 32;
  constexpr uint32_t kFull = Tile::kBoxes ? 1 : Tile::kSource == KeySource::kRows ? kGroupThreads + kWarps : kWarps;
  for (int i = 0; i < Tile::kStages; ++i) {
    init_barrier(shared.full(i), kFull);
    init_barrier(shared.empty(i), 4 * groups);
  }
  for (int i = 0; i < Tile::kQuerySlots; ++i) {
    init_barrier(shared.plan_full(i), 1);
    init_barrier(shared.query_full(i), 1);
    init_barrier(shared.query_empty(i), groups);
  }
  fence_init_barrier();
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) prefill_kernel(const __grid_constant__ PrefillArgs a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)  // elsewhere it is never launched
  extern __shared__ char memory[];
  const PrefillShared<Tile> shared{(shared_address(memory) + 1023) & ~1023u};
  const uint32_t groups = a.groups, group_threads = groups * kGroupThreads;
  // The loader does not wait for the others.
  if (threadIdx.x < group_threads) {
    fill_constants<Tile>(shared, group_threads);
    fence_shared_writes();
    sync_threads(kStartBarrier, blockDim.x);
    if constexpr (Tile::kRegisters > Tile::kLoaderRegisters) take_registers<Tile::kRegisters>();
    wait_for_predecessor();
    release_successor();
    run_group<Tile>(a, shared);
  } else {
    if (threadIdx.x == group_threads) init_barriers<Tile>(shared, groups);
    __syncwarp();
    arrive_threads(kStartBarrier, blockDim.x);
    if constexpr (Tile::kRegisters > Tile::kLoaderRegisters) leave_registers<Tile::kLoaderRegisters>();
    if constexpr (Tile::kBoxes) {
      if (threadIdx.x < group_threads + 32) load_by_boxes<Tile>(a, shared);
    } else {
      load_by_rows<Tile>(a, shared);
    }
    wait_for_predecessor();
    release_successor();
  }
#endif
}

}  // namespace kestrel::cuda
