// Which tiles there are, worked out by every block for itself from the list on the device. A run is what one expert has
// of the list: adjacent blocks. Its rows are cut into tiles of equal size, so that a rest does not cost a tile of its
// own; the tiles of one panel of weights are neighbours, which read it from L2 but once from memory. Where experts have
// several tiles the runs of larger ones come first, and blocks take theirs to and fro: at 2048 tokens the busiest has
// 3% more than its share, 10% in the list's order.
#pragma once

#include "kestrel/hopper/mbarrier.cuh"
#include "kestrel/hopper/warp.cuh"

namespace kestrel::cuda {

constexpr int kTokenStep = 16;  // a tile's rows are a multiple of this

struct List {
  const int32_t *sorted_token_ids, *expert_ids, *num_tokens_post_pad;
  int32_t positions, blocks, block_m, assignments, experts;
};

// Rows [first, first + rows) of the list by block `panel_block` of the weights of `expert`.
struct TileWork {
  int32_t expert, panel_block, first, rows;
};

// Number `round` of this block's tiles.
__device__ __forceinline__ uint32_t own_tile(uint32_t round) {
  return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// In shared memory. A list with more runs than kRuns (none that alignment made of as many experts) is worked on in
// windows.
template <int kRuns, int kTokens>
struct Runs {
  int32_t first[kRuns], rows[kRuns], expert[kRuns], before[kRuns + 1];  // before: tiles of the runs before it
  int32_t next_block;                                                   // where the window ends; < 0: nothing follows
  int32_t warp_count[4];

  // For tiles in order: `run` is kept between calls.
  __device__ __forceinline__ bool get(uint32_t tile, int* run, TileWork* work) const {
    if (tile >= static_cast<uint32_t>(before[kRuns])) return false;
    while (static_cast<uint32_t>(before[*run + 1]) <= tile) ++*run;
    const uint32_t all = rows[*run], tiles = tiles_of(all), each = height_of(all);
    const uint32_t local = tile - before[*run], skipped = local % tiles * each;
    *work = {expert[*run], static_cast<int32_t>(local / tiles), static_cast<int32_t>(first[*run] + skipped),
             static_cast<int32_t>(min(each, all - skipped))};
    return true;
  }
  // Of a run's rows: tiles, and rows of each but the last.
  static __device__ __forceinline__ uint32_t tiles_of(uint32_t rows) { return (rows + kTokens - 1) / kTokens; }
  static __device__ __forceinline__ uint32_t height_of(uint32_t rows) {
    const uint32_t tiles = max(1u, tiles_of(rows));
    return ((rows + tiles - 1) / tiles + kTokenStep - 1) / kTokenStep * kTokenStep;
  }

  // By 128 threads, from `first_block` of the list on.
  __device__ __forceinline__ void build(const List& list, int32_t first_block, int32_t panel_blocks, bool sort) {
    constexpr int kThreads = 128, kEach = 2;
    const int thread = threadIdx.x % kThreads, warp = thread / kWarp, lane = thread % kWarp;
    const int32_t used = min(*list.num_tokens_post_pad, list.positions);
    const int32_t blocks = static_cast<int32_t>((int64_t{used} + list.block_m - 1) / list.block_m);
    int count = 0;
    for (int32_t base = first_block; count <= kRuns && base < list.blocks; base += kThreads * kEach) {
      int32_t ids[kEach + 1];  // of the blocks from one before the thread's first on
#pragma unroll
      for (int i = 0; i <= kEach; ++i) {
        const int32_t block = base + thread * kEach + i - 1;
        ids[i] = block >= first_block && block < list.blocks ? list.expert_ids[block] : -1;
      }
      uint32_t starts = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int32_t block = base + thread * kEach + i;
        if (block < blocks && (block == first_block || ids[i + 1] != ids[i])) starts |= 1u << i;
      }
      const int up_to_thread = sum_up_to_lane(__popc(starts)), before_thread = up_to_thread - __popc(starts);
      if (lane == kWarp - 1) warp_count[warp] = up_to_thread;
      sync_threads(1, kThreads);
      int index = count + before_thread;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if (w < warp) index += warp_count[w];
        count += warp_count[w];
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (!(starts >> i & 1)) continue;
        const int32_t block = base + thread * kEach + i;
        if (index < kRuns) {
          first[index] = block * list.block_m;
          expert[index] = ids[i + 1];
        } else if (index == kRuns) {
          next_block = block;
        }
        ++index;
      }
      sync_threads(1, kThreads);
      if (base + kThreads * kEach >= blocks) break;
    }
    const int kept = min(count, kRuns);
    const int32_t end = count > kRuns ? next_block * list.block_m : used;
    sync_threads(1, kThreads);
    if (thread == 0 && count <= kRuns) next_block = -1;

    for (int run = thread; run < kRuns; run += kThreads) {
      int32_t length = 0;
      if (run < kept && expert[run] >= 0 && expert[run] < list.experts)
        length = (run + 1 < kept ? first[run + 1] : end) - first[run];
      rows[run] = length;
    }
    sync_threads(1, kThreads);
    // What padding a run of several tiles ends with is cut off. Eight lanes for each run.
    constexpr int kLanes = 8, kLoads = 8;
    for (int base = 0; base < kept; base += kThreads / kLanes) {
      const int run = base + thread / kLanes;
      const bool several = run < kept && rows[run] > kTokens;
      if (!__any_sync(~0u, several)) continue;
      const int32_t length = several ? rows[run] : 0;
      int32_t found = 0, high = length;
      const int32_t low = several ? (length - 1) / list.block_m * list.block_m : 0;  // the last block's start
      while (true) {
        const bool more = found == 0 && high > low;
        if (!__any_sync(~0u, more)) break;
        int32_t ids[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int32_t row = high - 1 - (i * kLanes + thread % kLanes);
          ids[i] = more && row >= low ? list.sorted_token_ids[first[run] + row] : -1;
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
          if (ids[i] >= 0 && ids[i] < list.assignments) found = max(found, high - (i * kLanes + thread % kLanes));
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) found = max(found, __shfl_xor_sync(~0u, found, lanes));
        high -= kLanes * kLoads;
      }
      if (several && thread % kLanes == 0) rows[run] = found > 0 ? found : low;
    }
    sync_threads(1, kThreads);

    if (sort) {
      constexpr int kOwn = kRuns / kThreads;
      int32_t own_first[kOwn], own_rows[kOwn], own_expert[kOwn], rank[kOwn] = {};
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int run = thread + i * kThreads;
        own_first[i] = first[run];
        own_rows[i] = rows[run];
        own_expert[i] = expert[run];
      }
      for (int other = 0; other < kept; ++other) {
        const uint32_t high = height_of(rows[other]);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const uint32_t own = height_of(own_rows[i]);
          rank[i] += high > own || (high == own && other < thread + i * kThreads);
        }
      }
      sync_threads(1, kThreads);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (thread + i * kThreads >= kept) continue;
        first[rank[i]] = own_first[i];
        rows[rank[i]] = own_rows[i];
        expert[rank[i]] = own_expert[i];
      }
      sync_threads(1, kThreads);
    }
    constexpr int kOwn = kRuns / kThreads;
    int tiles[kOwn], sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      tiles[i] = tiles_of(rows[thread * kOwn + i]) * panel_blocks;
      sum += tiles[i];
    }
    const int total = sum_up_to_lane(sum);
    if (lane == kWarp - 1) warp_count[warp] = total;
    sync_threads(1, kThreads);
    int at = total - sum;
#pragma unroll
    for (int w = 0; w < 4; ++w)
      if (w < warp) at += warp_count[w];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      before[thread * kOwn + i] = at;
      at += tiles[i];
    }
    if (thread == kThreads - 1) before[kRuns] = at;
  }
};

}  // namespace kestrel::cuda
