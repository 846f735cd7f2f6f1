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

// In shared memory. A list with more runs than kRuns (none that alignment made of as many experts) is worked on in
// windows.
template <int kRuns, int kTokens>
struct Runs {
  int32_t first[kRuns], rows[kRuns], expert[kRuns], before[kRuns + 1];  // before: items of the runs before it
  int32_t next_block;                                                   // where the window ends; < 0: nothing follows
  int32_t warp_count[4];
  uint16_t order[kRuns];  // in which runs are worked on, as `before` has them

  // For items in order: `at` is kept between calls. The second tile of a pair may have no rows.
  __device__ __forceinline__ bool get(Pairing pairing, uint32_t round, int* at, TileWork* work) const {
    const uint32_t item = pairing.item(round);
    if (item >= static_cast<uint32_t>(before[kRuns])) return false;
    while (static_cast<uint32_t>(before[*at + 1]) <= item) ++*at;
    const int run = order[*at];
    const uint32_t all = rows[run], tiles = tiles_of(all, pairing), items = tiles >> pairing.paired;
    const uint32_t local = item - before[*at], tile = (local % items << pairing.paired) + pairing.rank();
    const uint32_t steps = (all + kTokenStep - 1) / kTokenStep, each = steps / tiles, rest = steps % tiles;
    const uint32_t skipped = min(all, (tile * each + min(tile, rest)) * kTokenStep);
    *work = {expert[run], static_cast<int32_t>(local / items), static_cast<int32_t>(first[run] + skipped),
             static_cast<int32_t>(min((each + (tile < rest ? 1 : 0)) * kTokenStep, all - skipped))};
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

  // By 128 threads, from `first_block` of the list on.
  __device__ __forceinline__ void build(const List& list, int32_t first_block, int32_t panel_blocks, Pairing pairing,
                                        bool sort) {
    constexpr int kThreads = 128;
    int thread = threadIdx.x % kThreads;
    compute_now(thread);  // what follows from it takes no registers afterwards
    const int warp = thread / kWarp, lane = thread % kWarp;
    const int32_t used = min(*list.num_tokens_post_pad, list.positions);
    const int32_t blocks = (used + list.block_m - 1) / list.block_m;
    int count = 0;
    for (int32_t base = first_block; count <= kRuns && base < list.blocks; base += kThreads) {
      const int32_t block = base + thread;
      // Not only of those in use, whose number is being loaded.
      const int32_t id = block < list.blocks ? list.expert_ids[block] : -1;
      const int32_t previous = block > first_block && block < list.blocks ? list.expert_ids[block - 1] : -1;
      const bool starts = block < blocks && (block == first_block || id != previous);
      const uint32_t found = __ballot_sync(~0u, starts);
      if (lane == 0) warp_count[warp] = __popc(found);
      sync_threads(1, kThreads);
      int index = count + __popc(found & ((1u << lane) - 1));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if (w < warp) index += warp_count[w];
        count += warp_count[w];
      }
      if (starts && index < kRuns) {
        first[index] = block * list.block_m;
        expert[index] = id;
      } else if (starts && index == kRuns) {
        next_block = block;
      }
      sync_threads(1, kThreads);
      if (base + kThreads >= blocks) break;
    }
    const int kept = min(count, kRuns);
    const int32_t end = count > kRuns ? next_block * list.block_m : used;
    sync_threads(1, kThreads);
    if (thread == 0 && count <= kRuns) next_block = -1;

#pragma unroll 1
    for (int run = thread; run < kRuns; run += kThreads) {
      int32_t length = 0;
      if (run < kept && expert[run] >= 0 && expert[run] < list.experts)
        length = (run + 1 < kept ? first[run + 1] : end) - first[run];
      rows[run] = length;
    }
    sync_threads(1, kThreads);
    // What padding a run of several tiles ends with is cut off. Four lanes for each run.
    constexpr int kLanes = 4, kLoads = 16;
#pragma unroll 1
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
      __syncwarp();  // four lanes have read it, and what comes between orders no memory
      if (several && thread % kLanes == 0) rows[run] = found > 0 ? found : low;
    }
    sync_threads(1, kThreads);

    // By loops, not unrolled: what runs once waits for its instructions. 64 runs took 16 us with divisions in the inner
    // loop, 6 with unrolled ones.
#pragma unroll 1
    for (int run = thread; run < kRuns; run += kThreads) {
      before[run] = height_of(rows[run], pairing);
      order[run] = run;
    }
    if (sort) {
      sync_threads(1, kThreads);
#pragma unroll 1
      for (int run = thread; run < kept; run += kThreads) {
        const int32_t own = before[run];
        int rank = 0;
#pragma unroll 4
        for (int other = 0; other < kept; ++other) {
          const int32_t high = before[other];
          rank += high > own || (high == own && other < run);
        }
        order[rank] = run;
      }
    }
    sync_threads(1, kThreads);
    constexpr int kOwn = kRuns / kThreads;
    int tiles[kOwn], sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      tiles[i] = (tiles_of(rows[order[thread * kOwn + i]], pairing) >> pairing.paired) * panel_blocks;
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
