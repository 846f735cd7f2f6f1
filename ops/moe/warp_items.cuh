// What a block of the kernels for few tokens works on: passes, each an expert and up to 8 or 16 of its assignments, in
// the order of the experts. Every block makes the lists for itself, in shared memory: from the alignment's arrays, or,
// for fused_moe, from the routing, by bits: bit a % 32 of word [a / 32][expert] is set where assignment a is of that
// expert, so that the lists come out sorted without any order among the threads.
#pragma once

#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/fragment.cuh"
#include "kestrel/hopper/mbarrier.cuh"
#include "kestrel/hopper/warp.cuh"

namespace kestrel::cuda {

struct MoeRouting {
  const int32_t *sorted_token_ids, *expert_ids, *num_tokens_post_pad;  // an alignment
  const int32_t *ids, *expert_map;                                     // or, unless ids is null, the routing
  int64_t ids_stride;
  Divider<uint32_t> slots, passes_per_block;
  uint32_t positions, assignments, experts, routed;
  uint32_t candidates, words;
  bool settled;  // may be read before the wait
};

struct MoeItems {
  uint32_t first, end;  // tiles [first, end) of all passes: tile t of pass i is number i * tiles + t
  uint32_t count;       // passes
  uint32_t unused;
};

struct MoeLists {
  MoeItems* items;
  int32_t* expert;  // [candidates]
  int32_t* listed;  // [candidates][columns] assignments, -1: none
  uint32_t* bits;   // [words + 1][experts], the last row where an expert's passes begin; then [assignments] experts
};

// Four entries from a multiple of four on; -1 for what is none.
__device__ __forceinline__ int4 load_entries(const MoeRouting& r, uint32_t at) {
  const int32_t* const from = r.sorted_token_ids + at;
  if (at + 4 <= r.positions) return *reinterpret_cast<const int4*>(from);
  const uint32_t left = at < r.positions ? r.positions - at : 0;
  return {left > 0 ? from[0] : -1, left > 1 ? from[1] : -1, left > 2 ? from[2] : -1, -1};
}

// By one warp: the passes of the alignment that have assignments; returns how many.
template <int kGroups>
__device__ __forceinline__ uint32_t list_aligned(const MoeRouting& r, const MoeLists& lists) {
  constexpr uint32_t kAhead = 2;
  const uint32_t lane = threadIdx.x % kWarp;
  const int32_t said = *r.num_tokens_post_pad;
  uint32_t count = 0;
  for (uint32_t first = 0; first < r.candidates; first += kAhead * kWarp) {
    int4 entries[kAhead][kGroups * 2];
    int32_t expert[kAhead];
#pragma unroll
    for (uint32_t i = 0; i < kAhead; ++i) {  // also what is not in use, which is memory of the list all the same
      const uint32_t candidate = first + i * kWarp + lane;
      expert[i] = -1;
#pragma unroll
      for (int j = 0; j < kGroups * 2; ++j) entries[i][j] = {-1, -1, -1, -1};
      if (candidate >= r.candidates) continue;
      uint32_t block, pass;
      r.passes_per_block(candidate, &block, &pass);
      expert[i] = r.expert_ids[block];
#pragma unroll
      for (uint32_t j = 0; j < kGroups * 2; ++j) entries[i][j] = load_entries(r, candidate * kGroups * 8 + j * 4);
    }
    const uint32_t used = said < 0 ? 0 : min(static_cast<uint32_t>(said), r.positions);
#pragma unroll
    for (uint32_t i = 0; i < kAhead; ++i) {
      const uint32_t start = (first + i * kWarp + lane) * kGroups * 8;
      bool any = false;
#pragma unroll
      for (uint32_t j = 0; j < kGroups * 2; ++j) {
        int4& e = entries[i][j];
        const auto keep = [&](int32_t& entry, uint32_t at) {
          const bool valid = start + j * 4 + at < used && static_cast<uint32_t>(entry) < r.assignments;
          if (!valid) entry = -1;
          any |= valid;
        };
        keep(e.x, 0);
        keep(e.y, 1);
        keep(e.z, 2);
        keep(e.w, 3);
      }
      any &= static_cast<uint32_t>(expert[i]) < r.experts;
      const uint32_t found = __ballot_sync(~0u, any);
      if (any) {
        const uint32_t at = count + __popc(found & ((1u << lane) - 1));
        lists.expert[at] = expert[i];
#pragma unroll
        for (uint32_t j = 0; j < kGroups * 2; ++j)
          reinterpret_cast<int4*>(lists.listed)[at * kGroups * 2 + j] = entries[i][j];
      }
      count += __popc(found);
    }
  }
  return count;
}

// By the whole block before the wait. An alignment is only sent on its way to L2, where later writes to it land too; by
// a few blocks, since requests of all for the same lines queue up.
template <int kGroups>
__device__ __forceinline__ void prepare_lists(const MoeRouting& r, const MoeLists& lists) {
  if (r.ids) {
    for (uint32_t i = threadIdx.x; i < r.words * r.experts; i += blockDim.x) lists.bits[i] = 0;
    for (uint32_t i = threadIdx.x; i < r.candidates * kGroups * 8; i += blockDim.x) lists.listed[i] = -1;
  } else if (blockIdx.x % 32 == 0) {
    uint32_t blocks, rest;
    r.passes_per_block(r.candidates, &blocks, &rest);
    for (uint32_t i = threadIdx.x * 32; i < r.positions; i += blockDim.x * 32) {
      prefetch(r.sorted_token_ids + i);
      if (i < blocks) prefetch(r.expert_ids + i);
    }
    if (threadIdx.x == 0) prefetch(r.num_tokens_post_pad);
  }
}

__device__ __forceinline__ int32_t expert_of(const auto& r, uint32_t token, uint32_t slot) {
  const int32_t expert = r.ids[token * r.ids_stride + slot];
  if (!r.expert_map) return expert;
  return static_cast<uint32_t>(expert) < r.routed ? r.expert_map[expert] : -1;
}

// From the routing: the bits, by the whole block ...
__device__ __forceinline__ void mark_experts(const MoeRouting& r, const MoeLists& lists) {
  uint32_t* const experts = lists.bits + (r.words + 1) * r.experts;
  for (uint32_t a = threadIdx.x; a < r.assignments; a += blockDim.x) {
    uint32_t token, slot;
    r.slots(a, &token, &slot);
    const int32_t expert = expert_of(r, token, slot);
    experts[a] = expert;
    if (static_cast<uint32_t>(expert) < r.experts)
      atomicOr(lists.bits + a / kWarp * r.experts + expert, 1u << a % kWarp);
  }
}

// ... by one warp: returns how many passes there are ...
template <int kGroups>
__device__ __forceinline__ uint32_t list_passes(const MoeRouting& r, const MoeLists& lists) {
  const uint32_t lane = threadIdx.x % kWarp;
  uint32_t total = 0;
  for (uint32_t first = 0; first < r.experts; first += kWarp) {
    const uint32_t expert = first + lane;
    uint32_t members = 0;
    if (expert < r.experts)
      for (uint32_t word = 0; word < r.words; ++word) members += __popc(lists.bits[word * r.experts + expert]);
    const uint32_t passes = (members + kGroups * 8 - 1) / (kGroups * 8);
    const uint32_t end = sum_up_to_lane(passes);
    const uint32_t start = total + end - passes;
    if (expert < r.experts) lists.bits[r.words * r.experts + expert] = start;
    for (uint32_t pass = 0; pass < passes; ++pass) lists.expert[start + pass] = expert;
    total += __shfl_sync(~0u, end, kWarp - 1);
  }
  return total;
}

// ... and by `threads` threads: the assignments of the passes.
template <int kGroups>
__device__ __forceinline__ void list_members(const MoeRouting& r, const MoeLists& lists, uint32_t threads) {
  const uint32_t* const experts = lists.bits + (r.words + 1) * r.experts;
  for (uint32_t a = threadIdx.x; a < r.assignments; a += threads) {
    const uint32_t expert = experts[a];
    if (expert >= r.experts) continue;
    const uint32_t* const bits = lists.bits + expert;
    uint32_t rank = __popc(bits[a / kWarp * r.experts] & ((1u << a % kWarp) - 1));
    for (uint32_t word = 0; word < a / kWarp; ++word) rank += __popc(bits[word * r.experts]);
    lists.listed[bits[r.words * r.experts] * kGroups * 8 + rank] = a;
  }
}

// By one warp alone, where it has a lane for each assignment: all of it.
template <int kGroups>
__device__ __forceinline__ uint32_t list_lanes(const MoeRouting& r, const MoeLists& lists) {
  const uint32_t lane = threadIdx.x % kWarp;
  uint32_t expert = ~0u;
  if (lane < r.assignments) {
    uint32_t token, slot;
    r.slots(lane, &token, &slot);
    expert = expert_of(r, token, slot);
  }
  const bool valid = expert < r.experts;
  const uint32_t alike = __match_any_sync(~0u, valid ? expert : ~0u);
  const uint32_t rank = __popc(alike & ((1u << lane) - 1));
  const uint32_t passes = valid && rank == 0 ? (__popc(alike) + kGroups * 8 - 1) / (kGroups * 8) : 0;
  uint32_t start = 0, count = 0;
#pragma unroll
  for (int other = 0; other < kWarp; ++other) {
    const uint32_t theirs = __shfl_sync(~0u, passes, other);
    if (__shfl_sync(~0u, expert, other) < expert) start += theirs;
    count += theirs;
  }
  for (uint32_t pass = 0; pass < passes; ++pass) lists.expert[start + pass] = expert;
  if (valid) lists.listed[start * kGroups * 8 + rank] = lane;
  __syncwarp();
  return count;
}

// By the whole block, of which the last warp is the producer, with the barriers between. Afterwards the producer may
// begin, and the others once they have met at finish_lists.
template <int kGroups>
__device__ __forceinline__ uint32_t begin_lists(const MoeRouting& r, const MoeLists& lists, bool producer) {
  uint32_t count = 0;
  if (r.ids) {
    __syncthreads();
    if (r.assignments <= kWarp) return producer ? list_lanes<kGroups>(r, lists) : 0;
    mark_experts(r, lists);
    __syncthreads();
    if (producer) count = list_passes<kGroups>(r, lists);
  } else if (producer) {
    count = list_aligned<kGroups>(r, lists);
  }
  return count;
}

template <int kGroups>
__device__ __forceinline__ void finish_lists(const MoeRouting& r, const MoeLists& lists, uint32_t threads) {
  if (!r.ids || r.assignments <= kWarp) return;
  list_members<kGroups>(r, lists, threads);
  sync_threads(1, threads);
}

}  // namespace kestrel::cuda
