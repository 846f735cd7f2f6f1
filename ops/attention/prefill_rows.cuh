// The loader of the prefill kernel for keys and values that lie row by row: paged, or e4m3 to be converted to f16
// (which holds every e4m3 exactly) on the way. A warpgroup: each warp brings 16 rows of a tile, 8 lanes to a row, and a
// lane works out one row's place for the others, its page known some tiles ahead. 16-bit rows come by asynchronous
// copies; e4m3 rows wait in registers for some tiles, so that enough bytes are under way.
#pragma once

#include "kestrel/hopper/mma.cuh"
#include "kestrel/hopper/numeric.cuh"
#include "kestrel/hopper/vec.cuh"
#include "ops/attention/prefill_load.cuh"

namespace kestrel::cuda {

constexpr int kLoaderBarrier = 12;  // see Group for the others

template <class Tile>
class RowLoader {
 public:
  __device__ __forceinline__ RowLoader(const PrefillArgs& a, const PrefillShared<Tile>& shared)
      : a_(a), shared_(shared), warp_(threadIdx.x % kGroupThreads / 32), lane_(threadIdx.x % 32) {}

  // A tile of work. `next`: the place of its first tile of keys in the rings. Tiles are counted from the last
  // downwards.
  __device__ __forceinline__ void load(const Plan& plan, uint32_t next) {
    constexpr int kAhead = Tile::kAhead;
    const int count = plan.last - plan.first;
    int pages[kAhead];
#pragma unroll
    for (int d = 0; d < kAhead; ++d) pages[d] = page_of(plan, d);
    if constexpr (Tile::kSource == KeySource::kRows) {
#pragma unroll 1
      for (int i = 0; i < count; i += kAhead) {
#pragma unroll
        for (int d = 0; d < kAhead; ++d) {
          if (i + d >= count) break;
          const Place<Tile::kStages> at{next + i + d};
          const int64_t place = place_of(plan, i + d, pages[d]);
          const uint32_t missing = missing_of(pages[d]);
          pages[d] = page_of(plan, i + d + kAhead);
          wait_empty<false>(at);
          tell_missing(missing, at);
          copy_rows<false>(place, at);
          copy_rows<true>(place, at);
        }
      }
    } else {
      Raw keys[kAhead], values[kAhead];
      uint32_t missing[kAhead];
#pragma unroll
      for (int d = 0; d < kAhead; ++d) {
        const int64_t place = place_of(plan, d, pages[d]);
        missing[d] = missing_of(pages[d]);
        pages[d] = page_of(plan, d + kAhead);
        fetch<false>(place, keys[d]);
        fetch<true>(place, values[d]);
      }
#pragma unroll 1
      for (int i = 0; i < count; i += kAhead) {
#pragma unroll
        for (int d = 0; d < kAhead; ++d) {
          if (i + d >= count) break;
          const Place<Tile::kStages> at{next + i + d};
          const int64_t place = place_of(plan, i + d + kAhead, pages[d]);
          wait_empty<false>(at);
          tell_missing(missing[d], at);
          missing[d] = missing_of(pages[d]);
          pages[d] = page_of(plan, i + d + 2 * kAhead);
          convert<false>(keys[d], at);
          fetch<false>(place, keys[d]);
          convert<true>(values[d], at);
          fetch<true>(place, values[d]);
        }
      }
    }
  }

 private:
  static constexpr int kChunks = Tile::kHead / 8;  // of a row, 8 elements each
  static constexpr int kPasses = (kChunks + 7) / 8, kRounds = 4;
  struct Raw {
    Vec<e4m3, 8> chunk[kRounds][kPasses];
  };

  // Lanes 0 to 15 look after the rows' keys, 16 to 31 after their values.
  __device__ __forceinline__ int key_of(const Plan& plan, int i) const {
    return (plan.last - 1 - i) * kTileRows + 16 * warp_ + lane_ % 16;
  }
  // kUnseen: a row that no query sees, kMissing: one of a page that is none. What lies there may be NaN, or nowhere: it
  // is not touched, and zeros stand for it.
  static constexpr int kUnseen = -1, kMissing = -2;
  __device__ __forceinline__ int page_of(const Plan& plan, int i) const {
    const AttentionProblem& p = a_.problem;
    const int key = key_of(plan, i);
    if (key < plan.first_key || key >= plan.last_key) return kUnseen;
    if (!p.page_table) return plan.k_batch;
    uint32_t entry, slot;
    a_.by_page_size(key, &entry, &slot);
    const int page = p.page_table[plan.k_batch * p.page_table_stride + entry];
    return page >= 0 && page < p.pages ? page : kMissing;
  }
  // In elements.
  __device__ __forceinline__ int64_t place_of(const Plan& plan, int i, int page) const {
    const AttentionProblem& p = a_.problem;
    uint32_t row = plan.s.k_first + key_of(plan, i), entry;
    if (p.page_table) a_.by_page_size(row, &entry, &row);
    if (page < 0) return -1;
    return (lane_ < 16 ? p.k_stride : p.v_stride).at(page, row, plan.k_head);
  }
  // That of the row of this lane in a round.
  template <bool kValues>
  __device__ __forceinline__ int64_t place_in(int64_t place, int round) const {
    return __shfl_sync(~0u, place, kValues * 16 + round * 4 + lane_ / 8);
  }
  __device__ __forceinline__ bool holds(int chunk) const {
    return chunk < kChunks && chunk * 8 < static_cast<int>(a_.problem.head_size);
  }
  // Which of the warp's rows are missing, and what the groups are told of it.
  __device__ __forceinline__ uint32_t missing_of(int page) const {
    return __ballot_sync(~0u, page == kMissing) & 0xffff;
  }
  __device__ __forceinline__ void tell_missing(uint32_t missing, Place<Tile::kStages> at) const {
    if (lane_ != 0) return;
    shared_.missing(at.stage())[warp_] = static_cast<uint16_t>(missing);
    // The arrivals of asynchronous copies do not speak for this store; those after a conversion do.
    if (Tile::kSource == KeySource::kRows) arrive(shared_.keys_full(at.stage()));
  }
  template <bool kValues>
  __device__ __forceinline__ uint32_t wait_empty(Place<Tile::kStages> at) const {
    wait_barrier(kValues ? shared_.values_empty(at.stage()) : shared_.keys_empty(at.stage()), at.parity() ^ 1);
    return kValues ? shared_.values(at.stage()) : shared_.keys(at.stage());
  }

  template <bool kValues>
  __device__ __forceinline__ void copy_rows(int64_t place, Place<Tile::kStages> at) const {
    using T = typename Tile::T;
    const T* from = static_cast<const T*>(kValues ? a_.problem.v : a_.problem.k);
    const uint32_t to = wait_empty<kValues>(at);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int64_t row = place_in<kValues>(place, round);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int chunk = pass * 8 + lane_ % 8;
        const bool valid = row >= 0 && holds(chunk);
        if (kChunks % 8 == 0 || chunk < kChunks)
          copy_async(to + tile_offset(16 * warp_ + round * 4 + lane_ / 8, chunk), from + (valid ? row + chunk * 8 : 0),
                     valid ? 16 : 0);
      }
    }
    arrive_after_copies(kValues ? shared_.values_full(at.stage()) : shared_.keys_full(at.stage()));
  }

  template <bool kValues>
  __device__ __forceinline__ void fetch(int64_t place, Raw& raw) const {
    const e4m3* from = static_cast<const e4m3*>(kValues ? a_.problem.v : a_.problem.k);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int64_t row = place_in<kValues>(place, round);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int chunk = pass * 8 + lane_ % 8;
        raw.chunk[round][pass] = load_if(row >= 0 && holds(chunk), from + row + chunk * 8);
      }
    }
  }
  template <bool kValues>
  __device__ __forceinline__ void convert(const Raw& raw, Place<Tile::kStages> at) const {
    const uint32_t to = wait_empty<kValues>(at);
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int chunk = pass * 8 + lane_ % 8;
        const uint32_t low = raw.chunk[round][pass].words[0], high = raw.chunk[round][pass].words[1];
        if (kChunks % 8 == 0 || chunk < kChunks)
          store_shared(to + tile_offset(16 * warp_ + round * 4 + lane_ / 8, chunk),
                       {to_f16x2(low), to_f16x2(low >> 16), to_f16x2(high), to_f16x2(high >> 16)});
      }
    fence_shared_writes();
    __syncwarp();
    if (lane_ == 0) arrive(kValues ? shared_.values_full(at.stage()) : shared_.keys_full(at.stage()));
  }

  const PrefillArgs& a_;
  const PrefillShared<Tile> shared_;
  const int warp_, lane_;
};

template <class Tile>
__device__ __forceinline__ void load_by_rows(const PrefillArgs& a, const PrefillShared<Tile>& shared) {
  const bool plans = threadIdx.x % kGroupThreads < 32;
  RowLoader<Tile> loader(a, shared);
  Planner planner;
  uint32_t next = 0;
#pragma unroll 1
  for (uint32_t n = 0;; ++n) {
    const Place<Tile::kQuerySlots> slot{n};
    if (plans) next_plan<Tile>(a, shared, slot, planner);
    wait_for_predecessor();
    if (n == 0) release_successor();
    const Plan* plan = shared.plan(slot.stage());
    sync_threads(kLoaderBarrier, kGroupThreads);
    if (plan->head < 0) return;
    loader.load(*plan, next);
    next += plan->last - plan->first;
    // Everybody is done with this plan's place before the next one is written there.
    sync_threads(kLoaderBarrier, kGroupThreads);
  }
}

}  // namespace kestrel::cuda
