// Which tiles there are, worked out by every block for itself from the list on the device. A run is what one expert has
// of the list: adjacent blocks. Its rows are cut into tiles as equal as can be, so that a rest does not cost a tile of
// its own; the tiles of one panel of weights are neighbours, which read it from L2 but once from memory. Where experts
// have several tiles the runs of larger ones come first, and blocks take theirs to and fro: at 2048 tokens the busiest
// has 3% more than its share, 10% in the list's order. A pair of blocks (a cluster) takes two tiles of a run at once.
#pragma once

#include "kestrel/hopper/cluster.cuh"
#include "kestrel/hopper/mbarrier.cuh"
#include "kestrel/hopper/pdl.cuh"
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

// Whether blocks work in pairs, each on a tile of its own: then all of this is the same for both but the rank.
struct Pairing {
  uint32_t paired;  // 0 or 1

  __device__ __forceinline__ uint32_t rank() const { return blockIdx.x & paired; }
  // Number `round` of what this block, or its pair, takes.
  __device__ __forceinline__ uint32_t item(uint32_t round) const {
    const uint32_t places = gridDim.x >> paired, own = blockIdx.x >> paired;
    return round * places + (round % 2 ? places - 1 - own : own);
  }
};

// In shared memory. Of a list with more than kRuns (none that alignment made of as many experts) each block from `rest`
// on is a run of its own.
template <int kRuns, int kTokens>
struct Runs {
  int32_t first[kRuns], rows[kRuns], expert[kRuns], before[kRuns + 1];  // before: items of the runs before it
  int32_t rest, blocks, used;                                           // of the list; rows of it
  int32_t rest_tiles, rest_items;                                       // of a block from `rest` on
  int32_t warp_sum[kWarp];
  uint16_t order[kRuns];  // in which runs are worked on, as `before` has them

  // For items in order: `at` is kept between calls. The second tile of a pair may have no rows.
  __device__ __forceinline__ bool get(const List& list, Pairing pairing, uint32_t round, int* at,
                                      TileWork* work) const {
    uint32_t local = pairing.item(round), all, tiles;
    if (local < static_cast<uint32_t>(before[kRuns])) {
      while (static_cast<uint32_t>(before[*at + 1]) <= local) ++*at;
      local -= before[*at];
      const int run = order[*at];
      work->expert = expert[run];
      work->first = first[run];
      all = rows[run];
      tiles = tiles_of(all, pairing);
    } else {
      local -= before[kRuns];
      const uint32_t block = rest + local / rest_items;
      if (block >= static_cast<uint32_t>(blocks)) return false;
      local %= rest_items;
      work->expert = list.expert_ids[block];
      work->first = block * list.block_m;
      all = min(list.block_m, used - work->first);
      if (work->expert < 0 || work->expert >= list.experts) work->expert = all = 0;
      tiles = rest_tiles;
    }
    const uint32_t items = tiles >> pairing.paired, tile = (local % items << pairing.paired) + pairing.rank();
    const uint32_t steps = (all + kTokenStep - 1) / kTokenStep, each = steps / tiles, more = steps % tiles;
    const uint32_t skipped = min(all, (tile * each + min(tile, more)) * kTokenStep);
    work->panel_block = local / items;
    work->first += skipped;
    work->rows = min((each + (tile < more ? 1 : 0)) * kTokenStep, all - skipped);
    return true;
  }
  // Of a run's rows: tiles, and steps of the highest.
  static __device__ __forceinline__ uint32_t tiles_of(uint32_t rows, Pairing pairing) {
    return ((rows + kTokens - 1) / kTokens + pairing.paired) & ~pairing.paired;
  }
  static __device__ __forceinline__ uint32_t height_of(uint32_t rows, Pairing pairing) {
    const uint32_t tiles = max(1u, tiles_of(rows, pairing)), steps = (rows + kTokenStep - 1) / kTokenStep;
    return (steps + tiles - 1) / tiles;
  }

  // Over the threads before this one; `all`: over all.
  template <int kThreads>
  __device__ __forceinline__ int sum_before(int value, int* all) {
    const int warp = threadIdx.x / kWarp, up_to = sum_up_to_lane(value);
    if (threadIdx.x % kWarp == kWarp - 1) warp_sum[warp] = up_to;
    __syncthreads();
    int before_warp = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w == warp) before_warp = sum;
      sum += warp_sum[w];
    }
    __syncthreads();
    *all = sum;
    return before_warp + up_to - value;
  }

  // By the whole block. Few loads that wait for one another, and little code: what runs once waits for its
  // instructions, too.
  template <int kThreads>
  __device__ __forceinline__ void build(const List& list, int32_t panel_blocks, Pairing pairing, bool sort) {
    static_assert(kThreads >= kRuns);
    int thread = threadIdx.x;
    compute_now(thread);  // what follows from it takes no registers afterwards
    const int warp = thread / kWarp, lane = thread % kWarp;
    const int32_t in_use = max(0, min(*list.num_tokens_post_pad, list.positions));
    int count = 0;
    for (int32_t base = 0; count <= kRuns && base < list.blocks; base += kThreads) {
      const int32_t block = base + thread;
      // Not only of those in use, whose number is being loaded.
      const int32_t id = block < list.blocks ? list.expert_ids[block] : -1;
      const int32_t previous = block > 0 && block < list.blocks ? list.expert_ids[block - 1] : -1;
      const bool starts = block < list.blocks && block * list.block_m < in_use && (block == 0 || id != previous);
      int found;
      const int index = count + sum_before<kThreads>(starts, &found);
      count += found;
      if (starts && index < kRuns) {
        first[index] = block * list.block_m;
        expert[index] = id;
      } else if (starts && index == kRuns) {
        rest = block;
      }
      if ((base + int64_t{kThreads}) * list.block_m >= in_use) break;
    }
    if (thread == 0) {
      used = in_use;
      blocks = (in_use + list.block_m - 1) / list.block_m;
      if (count <= kRuns) rest = blocks;
      rest_tiles = tiles_of(min(list.block_m, list.positions), pairing);
      rest_items = (rest_tiles >> pairing.paired) * panel_blocks;
    }
    const int kept = min(count, kRuns);
    __syncthreads();

    // What padding a run of several tiles ends with is cut off, of its last 128 rows: blocks are no higher, as a rule.
    // A warp has eight runs at a time, and all their loads under way.
    constexpr int kAtOnce = 8, kLoads = 4;
#pragma unroll 1
    for (int base = warp * kAtOnce; base < kept; base += kThreads / kWarp * kAtOnce) {
      const int run = base + lane % kAtOnce;
      int32_t length = 0, last = 0;
      if (run < kept && expert[run] >= 0 && expert[run] < list.experts) {
        last = run + 1 < kept ? first[run + 1] : min(rest * list.block_m, in_use);
        length = last - first[run];
      }
      const bool several = length > kTokens;
      if (__any_sync(~0u, several)) {
        const int32_t looked = several ? min(min(list.block_m, kLoads * kWarp), length) : 0;
        int32_t ids[kAtOnce][kLoads];
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          const int32_t rows_looked = __shfl_sync(~0u, looked, r);
          const int32_t* const from = list.sorted_token_ids + __shfl_sync(~0u, last, r) - 1 - lane;
#pragma unroll
          for (int i = 0; i < kLoads; ++i) ids[r][i] = i * kWarp + lane < rows_looked ? from[-i * kWarp] : -1;
        }
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          int32_t padding = kLoads * kWarp;
#pragma unroll
          for (int i = kLoads - 1; i >= 0; --i)
            if (static_cast<uint32_t>(ids[r][i]) < static_cast<uint32_t>(list.assignments)) padding = i * kWarp + lane;
          padding = __reduce_min_sync(~0u, padding);
          if (lane == r) length -= min(padding, looked);
        }
      }
      if (lane < kAtOnce && run < kept) {
        rows[run] = length;
        before[run] = height_of(length, pairing);
        order[run] = run;
      }
    }
    __syncthreads();

    if (sort) {
      constexpr int kLanes = 4;
#pragma unroll 1
      for (int base = 0; base < kept; base += kThreads / kLanes) {
        const int run = base + thread / kLanes;
        const int32_t own = run < kept ? before[run] : 0;
        int rank = 0;
#pragma unroll 4
        for (int other = thread % kLanes; other < kept; other += kLanes) {
          const int32_t high = before[other];
          rank += high > own || (high == own && other < run);
        }
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) rank += __shfl_xor_sync(~0u, rank, lanes);
        if (thread % kLanes == 0 && run < kept) order[rank] = run;
      }
      __syncthreads();
    }
    const int items = thread < kept ? (tiles_of(rows[order[thread]], pairing) >> pairing.paired) * panel_blocks : 0;
    int all;
    const int start = sum_before<kThreads>(items, &all);
    if (thread < kRuns) before[thread] = start;
    if (thread == 0) before[kRuns] = all;
  }
};

}  // namespace kestrel::cuda
