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
  int32_t warp_count[16];
  uint16_t order[kRuns];  // in which runs are worked on, as `before` has them
  uint64_t barrier;

  // Each warp that builds arrives at this barrier when it has. Of a __syncthreads in two branches racecheck makes races.
  __device__ __forceinline__ uint32_t made() const { return shared_address(&barrier); }

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

  // By kThreads threads, from `first_block` of the list on. Little code, and few loads that wait for one another: what
  // runs once waits for its instructions, too. Inlined, it takes registers that the products need.
  template <int kThreads>
  __device__ __noinline__ void build(List list, int thread, int32_t first_block, int32_t panel_blocks, Pairing pairing,
                                     bool sort) {
    constexpr int kWarps = kThreads / kWarp, kAhead = 2;
    const int warp = thread / kWarp, lane = thread % kWarp;
    const int32_t used = min(*list.num_tokens_post_pad, list.positions);
    int count = 0;
    for (int32_t base = first_block; count <= kRuns && base < list.blocks; base += kAhead * kThreads) {
      int32_t id[kAhead];
      uint32_t found[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int32_t block = base + i * kThreads + thread;
        // Not only of those in use, whose number is being loaded.
        id[i] = block < list.blocks ? list.expert_ids[block] : -1;
        const int32_t previous = block > first_block && block < list.blocks ? list.expert_ids[block - 1] : -1;
        const bool starts =
            block < list.blocks && block * list.block_m < used && (block == first_block || id[i] != previous);
        found[i] = __ballot_sync(~0u, starts);
        if (lane == 0) warp_count[i * kWarps + warp] = __popc(found[i]);
      }
      sync_threads(1, kThreads);
      int index[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        index[i] = count + __popc(found[i] & ((1u << lane) - 1));
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const int there = warp_count[i * kWarps + w];
          if (w < warp) index[i] += there;
          count += there;
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int32_t block = base + i * kThreads + thread;
        const bool starts = found[i] >> lane & 1;
        if (starts && index[i] < kRuns) {
          first[index[i]] = block * list.block_m;
          expert[index[i]] = id[i];
        }
        if (starts && index[i] == kRuns) next_block = block;
      }
      sync_threads(1, kThreads);
      if ((base + int64_t{kAhead * kThreads}) * list.block_m >= used) break;
    }
    const int kept = min(count, kRuns);
    const int32_t end = count > kRuns ? next_block * list.block_m : used;
    if (thread == 0 && count <= kRuns) next_block = -1;

    // What padding a run of several tiles ends with is cut off, of its last 128 rows: blocks are no higher, as a rule.
    // A warp has eight runs at a time, and all their loads under way.
    constexpr int kAtOnce = 8, kLoads = 4;
#pragma unroll 1
    for (int base = warp * kAtOnce; base < kept; base += kWarps * kAtOnce) {
      const int run = base + lane % kAtOnce;
      int32_t length = 0, last = 0;
      if (run < kept && expert[run] >= 0 && expert[run] < list.experts) {
        last = run + 1 < kept ? first[run + 1] : end;
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
    sync_threads(1, kThreads);

    if (sort) {
      constexpr int kLanes = 4;
      const int part = thread % kLanes;
#pragma unroll 1
      for (int base = 0; base < kept; base += kThreads / kLanes) {
        const int run = base + thread / kLanes;
        const int32_t own = run < kept ? before[run] : 0;
        int rank = 0;
#pragma unroll 4
        for (int other = part; other < kept; other += kLanes) {
          const int32_t high = before[other];
          rank += high > own || (high == own && other < run);
        }
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) rank += __shfl_xor_sync(~0u, rank, lanes);
        if (part == 0 && run < kept) order[rank] = run;
      }
      sync_threads(1, kThreads);
    }
    constexpr int kOwn = (kRuns + kThreads - 1) / kThreads;
    int items[kOwn], sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = thread * kOwn + i;
      items[i] = at < kept ? (tiles_of(rows[order[at]], pairing) >> pairing.paired) * panel_blocks : 0;
      sum += items[i];
    }
    const int total = sum_up_to_lane(sum);
    if (lane == kWarp - 1) warp_count[warp] = total;
    sync_threads(1, kThreads);
    int at = total - sum;
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      if (w < warp) at += warp_count[w];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (thread * kOwn + i < kRuns) before[thread * kOwn + i] = at;
      at += items[i];
    }
    if (thread == kThreads - 1) before[kRuns] = at;
    __syncwarp();
    if (lane == 0) arrive(made());
  }
};

}  // namespace kestrel::cuda
