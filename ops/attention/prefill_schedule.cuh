// Who does what: tiles of work in their order, the longest first, and the tiles of keys that each of their parts needs.
#pragma once

#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/warp.cuh"
#include "ops/attention/device.cuh"
#include "ops/attention/prefill_args.h"

namespace kestrel::cuda {

// problem.h's Sequence and visible_keys() in 32 bits: registers are scarce here.
struct Lengths {
  int q_first, q_len, k_first, k_len, prefix;
};

// Lengths come from device memory: whatever stands there, rows lie within the tensors.
__device__ __forceinline__ Lengths lengths_of(const AttentionProblem& p, int b) {
  Lengths s{0, static_cast<int>(p.q_len), 0, static_cast<int>(p.k_len), static_cast<int>(p.prefix_len)};
  if (p.prefix_lens) s.prefix = p.prefix_lens[b];
  if (p.cu_seqlens_q) {
    const int end = min(p.cu_seqlens_q[b + 1], s.q_len);
    s.q_first = max(p.cu_seqlens_q[b], 0);
    s.q_len = max(end - s.q_first, 0);
  }
  if (p.cu_seqlens_k) {
    const int end = min(p.cu_seqlens_k[b + 1], s.k_len);
    s.k_first = max(p.cu_seqlens_k[b], 0);
    s.k_len = max(end - s.k_first, 0);
  }
  if (p.seqused_k) s.k_len = max(min(p.seqused_k[b], s.k_len), 0);
  return s;
}

// The keys that a query sees.
__device__ __forceinline__ Range visible(const AttentionProblem& p, int q_len, int k_len, int prefix, int query) {
  const int position = query + k_len - q_len, left = static_cast<int>(p.window_left);
  const int right = static_cast<int>(p.window_right);
  int first = 0, last = k_len;
  if (p.causal) last = min(position + 1, k_len);  // past the last query there are none to see more
  if (prefix >= 0 && position < prefix) last = min(prefix, k_len);
  if (left >= 0) first = max(position - left, 0);
  if (right >= 0) last = min(last, position + right + 1);
  return {first, max(first, last)};
}

// Some queries of one head: one tile of rows for each group.
struct Work {
  Lengths s;
  int batch;
  int tile, tiles;  // among those of its sequence; tiles = 0: nothing to do
};

// Tiles of keys, [first, last); all rows see all keys of those in [clear_first, clear_last).
struct KeyTiles {
  int first, last, clear_first, clear_last;
};

// A tile of work as the loader tells it to the groups, through shared memory.
struct Plan {
  int head;  // -1: no more work
  int k_head, q_batch, k_batch;
  int part, rows;  // of the tiles of rows from the work's first on: the first that is done here, and how many
  Lengths s;
  int first, last;          // tiles of keys that any group needs
  int first_key, last_key;  // and keys
  int row[kMostGroups];     // each group's first query
  KeyTiles keys[kMostGroups];
};

// Finds the sequence of tile `tile` of the packed ones, each of which has ceil(length / rows) of them: the whole warp,
// 32 sequences at a time. Returns false past the last.
__device__ __forceinline__ bool find_sequence_of_tile(const AttentionProblem& p, int rows, int tile, Work* w) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < p.batch; first += 32) {
    const int b = first + lane;
    int count = 0;
    if (b < p.batch) count = (lengths_of(p, b).q_len + rows - 1) / rows;
    const int end = sum_up_to_lane(count);
    const unsigned past = __ballot_sync(~0u, tile < end);
    if (past) {
      const int found = __ffs(static_cast<int>(past)) - 1;
      w->tiles = __shfl_sync(~0u, count, found);
      w->tile = tile - __shfl_sync(~0u, end - count, found);
      w->batch = first + found;
      w->s = lengths_of(p, w->batch);
      return true;
    }
    tile -= __shfl_sync(~0u, end, 31);
  }
  return false;
}

// Late rows see the most keys when there is a causal mask: they come first. The head goes straight to the plan.
__device__ __forceinline__ Work work_of(const PrefillArgs& a, uint32_t index, Plan* plan) {
  const AttentionProblem& p = a.problem;
  Work w;
  uint32_t section, rest, tile, at;
  a.by_section_tiles(index, &section, &rest);
  const uint32_t first = section * a.section, left = a.heads - first;
  a.by_section(rest, &tile, &at);
  if (left < a.section) {
    tile = rest / left;
    at = rest - tile * left;
  }
  uint32_t b, head;
  a.by_q_heads(first + at, &b, &head);
  plan->head = head;
  // What follows from lengths that the predecessor may write comes last: plans are made while it ends.
  if (!a.fixed) wait_for_predecessor();
  if (p.cu_seqlens_q) {
    w.tiles = 0;
    if (!find_sequence_of_tile(p, a.groups * kTileRows, tile, &w)) return w;
    w.tile = w.tiles - 1 - w.tile;
  } else {
    w.batch = b;
    w.tiles = a.row_tiles;
    w.tile = a.row_tiles - 1 - tile;
    w.s = lengths_of(p, w.batch);
  }
  return w;
}

// Gives a block its tiles of work, back and forth, so that long and short ones come together: block i of G has i,
// 2 G - 1 - i, 2 G + i, ...
struct Planner {
  uint32_t round = 0;

  __device__ __forceinline__ bool next(const PrefillArgs& a, Work* w, Plan* plan) {
    for (;;) {
      uint32_t index = round * a.blocks + (round % 2 ? a.blocks - 1 - blockIdx.x : blockIdx.x);
      if (index >= a.tiles) return false;
      ++round;
      plan->part = 0, plan->rows = a.groups;
      const bool whole = index < a.whole;
      if (!whole) {
        uint32_t head, part;
        a.by_parts(index - a.whole, &head, &part);
        plan->part = part * a.part_groups, plan->rows = a.part_groups;
        index = a.whole + head * a.row_tiles;
      }
      *w = work_of(a, index, plan);
      if (!whole) w->tile = 0;
      if (w->tiles > 0) return true;
    }
  }
};

// The first query of a group. Paired, group 0 has the longest rows and the last group the shortest.
__device__ __forceinline__ int first_row(const PrefillArgs& a, const Work& w, int group) {
  int tile = w.tile * a.groups + group;
  if (a.paired) {
    const int order = w.tiles - 1 - w.tile, part = a.groups - 1 - group;
    const bool falling = group == 0 || (a.groups == 4 && part == 1);
    tile = part * w.tiles + (falling ? w.tiles - 1 - order : order);
  }
  return tile * kTileRows;
}

// `keys`: those that the group's rows see, from the first to the last.
__device__ __forceinline__ KeyTiles key_tiles(const AttentionProblem& p, const Lengths& s, int row, Range* keys) {
  *keys = {0x7fffffff, 0};
  const int end = min(row + kTileRows, s.q_len);
  if (row >= end) return {0, 0, 0, 0};
  const Range top = visible(p, s.q_len, s.k_len, s.prefix, row);
  const Range bottom = visible(p, s.q_len, s.k_len, s.prefix, end - 1);
  if (top.first >= bottom.last) return {0, 0, 0, 0};
  *keys = {top.first, bottom.last};
  return {top.first / kTileRows, (bottom.last + kTileRows - 1) / kTileRows, (bottom.first + kTileRows - 1) / kTileRows,
          top.last / kTileRows};
}

// By the whole warp, a lane for each group.
__device__ __forceinline__ void write_plan(const PrefillArgs& a, const Work& w, Plan* plan) {
  __syncwarp();  // every lane has written head, part and rows
  const int group = threadIdx.x % 32;
  Range keys{0x7fffffff, 0};
  if (group < a.groups) {
    const int row = group < plan->rows ? first_row(a, w, plan->part + group) : w.s.q_len;
    plan->row[group] = row;
    plan->keys[group] = key_tiles(a.problem, w.s, row, &keys);
  }
  const int last = __reduce_max_sync(~0u, keys.last), first = min(__reduce_min_sync(~0u, keys.first), last);
  if (group == 0) {
    uint32_t k_head, member;
    a.by_group(plan->head, &k_head, &member);
    plan->k_head = k_head;
    plan->q_batch = a.problem.cu_seqlens_q ? 0 : w.batch;
    plan->k_batch = a.problem.cu_seqlens_k ? 0 : w.batch;
    plan->s = w.s;
    plan->first_key = first;
    plan->last_key = last;
    plan->first = first / kTileRows;
    plan->last = (last + kTileRows - 1) / kTileRows;
  }
  __syncwarp();
}

}  // namespace kestrel::cuda
