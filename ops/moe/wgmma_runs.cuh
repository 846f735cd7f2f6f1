// Which tiles there are, worked out by every block for itself from the list on the device. A run is what one expert has
// of the list: adjacent blocks. Its rows are cut into tiles of equal size, so that a rest does not cost a tile of its
// own; the tiles of one panel of weights are neighbours, which read it from L2 but once from memory. A cluster takes
// as many tiles at once as it has blocks: they share the weights.
#pragma once

#include "kestrel/hopper/cluster.cuh"
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

// This block's place: the cluster that it belongs to, of 2 to the `bits` blocks, and its own in that. Nothing is kept
// in a register for it.
struct Place {
  uint32_t bits;

  __device__ __forceinline__ uint32_t size() const { return 1u << bits; }
  __device__ __forceinline__ uint32_t rank() const { return blockIdx.x & (size() - 1); }
  __device__ __forceinline__ uint32_t cluster() const { return blockIdx.x >> bits; }
  __device__ __forceinline__ uint32_t clusters() const { return gridDim.x >> bits; }
};

// In shared memory. A list with more runs than kRuns (none that alignment made of as many experts) is worked on in
// windows.
template <int kRuns, int kTokens>
struct Runs {
  int32_t first[kRuns], rows[kRuns], expert[kRuns], before[kRuns + 1];  // before: tiles of the runs before it
  int32_t next_block;                                                   // where the window ends; < 0: nothing follows
  int32_t warp_count[4];

  // For a cluster's tiles in order, that of its block `rank`, which may have no rows: `run` is kept between calls.
  __device__ __forceinline__ bool get(uint32_t tile, const Place& place, int* run, TileWork* work) const {
    if (tile >= static_cast<uint32_t>(before[kRuns])) return false;
    while (static_cast<uint32_t>(before[*run + 1]) <= tile) ++*run;
    const uint32_t all = rows[*run], at_once = together(all, place.bits), tiles = at_once << place.bits;
    const uint32_t tile_rows = ((all + tiles - 1) / tiles + kTokenStep - 1) / kTokenStep * kTokenStep;
    const uint32_t local = tile - before[*run];
    const uint32_t skipped = min(all, ((local % at_once << place.bits) + place.rank()) * tile_rows);
    *work = {expert[*run], static_cast<int32_t>(local / at_once), static_cast<int32_t>(first[*run] + skipped),
             static_cast<int32_t>(min(tile_rows, all - skipped))};
    return true;
  }
  // How many times a cluster takes tiles to have all of `rows`.
  static __device__ __forceinline__ uint32_t together(uint32_t rows, uint32_t cluster_bits) {
    return (((rows + kTokens - 1) / kTokens - 1) >> cluster_bits) + 1;
  }

  // By 128 threads, from `first_block` of the list on.
  __device__ __forceinline__ void build(const List& list, int32_t first_block, int32_t panel_blocks,
                                        uint32_t cluster_bits) {
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
      int before_thread = __popc(starts);
#pragma unroll
      for (int lanes = 1; lanes < kWarp; lanes *= 2) {
        const int other = __shfl_up_sync(~0u, before_thread, lanes);
        if (lane >= lanes) before_thread += other;
      }
      if (lane == kWarp - 1) warp_count[warp] = before_thread;
      before_thread -= __popc(starts);
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

    constexpr int kOwn = kRuns / kThreads;
    int tiles[kOwn], sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int32_t run_rows = rows[thread * kOwn + i];
      tiles[i] = run_rows > 0 ? together(run_rows, cluster_bits) * panel_blocks : 0;
      sum += tiles[i];
    }
    int total = sum;
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const int other = __shfl_up_sync(~0u, total, lanes);
      if (lane >= lanes) total += other;
    }
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
