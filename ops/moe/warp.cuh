// The products of experts at few tokens; hopper/weight_stream.cuh has the main loop. A pass is an expert and up to 16
// of its assignments (columns of mma); the tiles of all passes, one pass after another, are shared out evenly: a block
// has a contiguous range of them and keeps a pass's activations in registers from tile to tile. e4m3 goes through f16;
// scales of the weights come with them, on their barrier. Before the wait weights and lists are read where the lists
// are older than the predecessor (`settled`), else nothing. Bound by the weights' bytes. up, E64 H2048 I1024 K8 on an
// H200 at 1, 4, 16 tokens: bf16 17.5, 51.8, 109 us, fp8 10.4, 28.9, 59.2; settled at one token 15.8 and 10.0: what its
// target misses is the way from the wait to the first weights.
#pragma once

#include <utility>

#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/weight_stream.cuh"
#include "kestrel/hopper/wgmma.cuh"
#include "kestrel/launch.h"
#include "kestrel/tensor_map.h"
#include "ops/activation/gate.cuh"
#include "ops/moe/warp.h"
#include "ops/moe/warp_items.cuh"
#include "ops/moe/warp_rows.cuh"

namespace kestrel::cuda {

template <class Out>
struct MoeWarpArgs {
  CUtensorMap map;
  Out* out;
  const char* x;
  const float* x_scale;
  const float* w_scale[2];                                          // of the tile's upper and lower eight rows
  const float* topk_weights;                                        // null: none are applied
  int64_t out_stride, x_stride, scale_stride, topk_weights_stride;  // of x in bytes
  MoeRouting routing;
  Divider<uint32_t> slots_per_row, tiles, blocks;
  uint32_t width, depth_bytes;  // of the weights' type
  Gate gate;
  MoeWarpPlan plan;
};

constexpr uint32_t kScaleBytes = kTileRows * sizeof(float);  // of a stage

// At columns_at, twice for each team: while some threads finish a tile, others may be at the next pass.
template <int kGroups>
struct MoeColumns {
  float factor[kGroups * 8];  // routing weight and scale of x
};

template <int kGroups, class Out>
__device__ __forceinline__ MoeLists lists_of(const MoeWarpArgs<Out>& args, unsigned char* memory) {
  const MoeWarpPlan& plan = args.plan;
  const auto items = reinterpret_cast<MoeItems*>(memory + plan.items_at);
  return {items, reinterpret_cast<int32_t*>(items + 1), reinterpret_cast<int32_t*>(memory + plan.listed_at),
          reinterpret_cast<uint32_t*>(memory + plan.partial_at)};  // read for the last time before partials are stored
}

// By a whole warp: a stage with `first` of the tile's 16 rows, or of eight of both panels.
template <class W, MoeLayout kLayout, class Out>
__device__ __forceinline__ void copy_stage(const MoeWarpArgs<Out>& args, const Ring& ring, uint32_t scales,
                                           uint32_t first, uint32_t step, uint32_t expert) {
  const MoeWarpPlan& plan = args.plan;
  const uint32_t lane = threadIdx.x % kWarp, to = ring.address(), full = ring.full();
  const bool with_scales = sizeof(W) == 1 && step == 0;
  const uint32_t rows = min(kLayout == MoeLayout::kPlain ? 16u : 8u, args.width - first);
  if (lane == 0) {
    const uint32_t scale_bytes = rows * sizeof(float) * (kLayout == MoeLayout::kPlain ? 1 : 2);
    arrive_expecting(full, plan.stage_bytes + (with_scales ? scale_bytes : 0));
  }
  __syncwarp();
  if (plan.boxes) {
    if (lane == 0) copy_box(to, &args.map, 0, first, 0, step * plan.warps, expert, full);
  } else if (lane < plan.warps) {
    constexpr uint32_t kColumns = kSlabPitch / sizeof(W);
    copy_box(to + lane * kSlabBytes, &args.map, (step * plan.warps + lane) * kColumns, first, 0, 0, expert, full);
  }
  if constexpr (sizeof(W) == 1)
    if (with_scales && lane < (kLayout == MoeLayout::kPlain ? 1 : 2))
      copy_bulk(scales + ring.stage * kScaleBytes + lane * (kScaleBytes / 2),
                (lane == 0 ? args.w_scale[0] : args.w_scale[1]) + expert * args.scale_stride + first,
                rows * sizeof(float), full);
}

// The producer warp.
template <class W, MoeLayout kLayout, class Out>
__device__ __forceinline__ void stream_experts(const MoeWarpArgs<Out>& args, Ring ring, uint32_t base,
                                               const MoeLists& lists) {
  constexpr uint32_t kWidth = kLayout == MoeLayout::kPlain ? 16 : 8;
  const MoeWarpPlan& plan = args.plan;
  const uint32_t total = (lists.items->end - lists.items->first) * plan.steps;
  uint32_t step = 0, item, tile;
  args.tiles(lists.items->first, &item, &tile);
  for (uint32_t issued = 0; issued < total; ++issued) {
    // Once the ring has gone round, parity is 1, and the first phase of an empty barrier has parity 0.
    if (issued >= plan.stages) wait_barrier(ring.empty(), ring.parity ^ 1);
    copy_stage<W, kLayout>(args, ring, base + plan.scales_at, tile * kWidth, step, lists.expert[item]);
    if (++step == plan.steps) {
      step = 0;
      if (++tile == plan.tiles) {
        tile = 0;
        ++item;
      }
    }
    ring.advance();
  }
}

// The outputs of one tile of one pass; scale: of this thread's row, or of both panels'.
template <class W, MoeLayout kLayout, int kGroups, class Out>
__device__ __forceinline__ void finish_tile(const MoeWarpArgs<Out>& args, const float* partial, const int32_t* listed,
                                            const MoeColumns<kGroups>& columns, const float (&scale)[2], uint32_t tile,
                                            uint32_t thread) {
  constexpr uint32_t kWidth = kLayout == MoeLayout::kPlain ? 16 : 8, kCount = kGroups * 8;
  const MoeWarpPlan& plan = args.plan;
  for (uint32_t i = thread; i < kCount * kWidth; i += plan.warps * kWarp) {
    const uint32_t column = i / kWidth, row = i % kWidth, at = tile * kWidth + row;
    const int32_t assignment = listed[column];
    if (assignment < 0 || at >= args.width) continue;
    const float* const sums = partial + column * kPartialPitch + row;
    float a = sum_partial<kMoeWarps>(sums, plan.warps, kCount * kPartialPitch);
    Out* const out = args.out + assignment * args.out_stride + at;
    if constexpr (sizeof(W) == 1) a *= columns.factor[column] * scale[0];
    if constexpr (kLayout == MoeLayout::kPlain) {
      if (sizeof(W) == 2 && args.topk_weights) a *= columns.factor[column];
      *out = from_float<Out>(a);
    } else {
      float g = sum_partial<kMoeWarps>(sums + 8, plan.warps, kCount * kPartialPitch);
      if constexpr (sizeof(W) == 1) g *= columns.factor[column] * scale[1];
      if (plan.swapped) {
        const float first = g;
        g = a;
        a = first;
      }
      if constexpr (kLayout == MoeLayout::kGated) {
        *out = from_float<Out>(apply_gate<Out>(args.gate, a, g));
      } else {
        out[0] = from_float<Out>(a);
        out[args.width] = from_float<Out>(g);
      }
    }
  }
}

template <class W, class X, class Out, MoeLayout kLayout, int kKernel>
__global__ void __launch_bounds__(moe_threads(kMoeWarpKernels[kKernel]), kMoeWarpKernels[kKernel].blocks)
    moe_warp_kernel(const __grid_constant__ MoeWarpArgs<Out> args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kGroups = kMoeWarpKernels[kKernel].groups;
  constexpr uint32_t kTeams = kMoeWarpKernels[kKernel].teams;
  constexpr bool kStreamed = kMoeWarpKernels[kKernel].streamed;
  constexpr bool kQuantize = sizeof(W) < sizeof(X);  // x, of all tokens, before anything else
  static_assert(!kQuantize || (kGroups == 1 && kTeams == 2));
  constexpr int kSteps = moe_steps(sizeof(W) == 1);
  constexpr uint32_t kCount = kGroups * 8, kWidth = kLayout == MoeLayout::kPlain ? 16 : 8;
  extern __shared__ unsigned char unaligned[];
  const uint32_t base = (shared_address(unaligned) + 1023) & ~1023u;
  unsigned char* const memory = unaligned + (base - shared_address(unaligned));
  const MoeWarpPlan& plan = args.plan;
  const MoeRouting& routing = args.routing;
  Ring ring{base, base + plan.barriers_at, plan.stages, plan.stage_bytes};
  const MoeLists lists = lists_of<kGroups>(args, memory);
  constexpr bool kShares = moe_shares_registers(kMoeWarpKernels[kKernel]);
  const uint32_t lane = threadIdx.x % kWarp, threads = plan.warps * kWarp;  // of a team
  const uint32_t team_size = kShares ? kMoeWarps * kWarp : threads;
  const uint32_t team = (threadIdx.x >= team_size) + (kTeams == 2 && threadIdx.x >= 2 * team_size);
  const uint32_t member = threadIdx.x - team * team_size, warp = member / kWarp;
  const bool producer = team == kTeams && warp == 0;
  if (producer) {
    if (lane == 0) prefetch_map(&args.map);
    ring.init(plan.warps);
  }
  prepare_lists<kGroups>(routing, lists);
  if (!routing.settled) {
    wait_for_predecessor();
    release_successor();
  }
  [[maybe_unused]] RowPart<X> part;
  const uint32_t own_row = threadIdx.x / kWarp;
  if constexpr (kQuantize)
    if (own_row < plan.tokens)
      part.load_from(reinterpret_cast<const X*>(args.x + own_row * args.x_stride), args.depth_bytes);
  const uint32_t count = begin_lists<kGroups>(routing, lists, producer);
  if (producer && lane == 0) {
    uint32_t each, rest;
    args.blocks(count * plan.tiles, &each, &rest);
    lists.items->first = blockIdx.x * each + min(blockIdx.x, rest);
    lists.items->end = lists.items->first + each + (blockIdx.x < rest ? 1 : 0);
  }
  __syncthreads();
  if constexpr (kShares) {
    if (team == kTeams) {
      leave_registers<32>();
      if (producer) stream_experts<W, kLayout>(args, ring, base, lists);
      return;
    }
    take_registers<112>();
  } else {
    if (producer) return stream_experts<W, kLayout>(args, ring, base, lists);
  }
  finish_lists<kGroups>(routing, lists, kTeams * team_size);
  if (warp >= plan.warps) return;
  [[maybe_unused]] const uint32_t x_pitch = row_pitch(args.depth_bytes);
  if constexpr (kQuantize) {
    if (own_row < plan.tokens) {
      const float row_scale = part.quantize_to(memory + plan.x_at + own_row * x_pitch, args.depth_bytes);
      if (lane == 0) reinterpret_cast<float*>(memory + plan.x_scales_at)[own_row] = row_scale;
    }
    sync_threads(3, kTeams * threads);
  }
  if (routing.settled) {
    wait_for_predecessor();
    release_successor();
  }
  // Addresses are computed when they are needed, and where the loop stands is one number: the kernel for two groups has
  // no register left.
  const auto memory_now = [&] {
    uint32_t here = base;
    compute_now(here);
    return unaligned + (here - shared_address(unaligned));
  };
  const WeightLane weight_lane = WeightLane::in_boxes(warp, lane);
  uint4 x[kSteps][kGroups][2];
  constexpr bool kWide = sizeof(W) == 1 && !kStreamed;  // where registers allow
  uint4 wide[kWide ? kSteps : 1][kGroups][2][2];
  uint32_t rows[kGroups];
  constexpr uint32_t kNone = ~0u;  // a column of zeros
  // Where in a row this thread's part of a slab begins, in bytes of the weights' type.
  const auto at_step = [&](uint32_t step) { return (step * plan.warps + warp) * kSlabPitch + lane % 4 * 32; };
  const auto load_input = [&](int slot, uint32_t step) {
    const uint32_t at = at_step(step);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const char* const from = args.x + rows[n] * args.x_stride + at;
#pragma unroll
      for (uint32_t h = 0; h < 2; ++h) {
        x[slot][n][h] = {};
        if (rows[n] != kNone && at + h * 16 < args.depth_bytes) {
          if constexpr (kQuantize)
            x[slot][n][h] = load_shared(base + plan.x_at + rows[n] * x_pitch + at + h * 16);
          else
            x[slot][n][h] = *reinterpret_cast<const uint4*>(from + h * 16);
        }
      }
    }
  };
  const auto begin_pass = [&](uint32_t item) {
    unsigned char* const now = memory_now();
    const auto listed = reinterpret_cast<const int32_t*>(now + plan.listed_at) + item * kCount;
    MoeColumns<kGroups>& mine = reinterpret_cast<MoeColumns<kGroups>*>(now + plan.columns_at)[team * 2 + item % 2];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const int32_t assignment = listed[n * 8 + lane / 4];
      uint32_t row, slot;
      args.slots_per_row(assignment < 0 ? 0 : assignment, &row, &slot);
      rows[n] = assignment < 0 ? kNone : row;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_input(step, step);
    if (member < kCount && (sizeof(W) == 1 || kLayout == MoeLayout::kPlain)) {
      const int32_t assignment = listed[member];
      float factor = 1;
      if (assignment >= 0) {
        uint32_t row, token, slot;
        args.slots_per_row(assignment, &row, &slot);
        if (kQuantize)
          factor = reinterpret_cast<const float*>(now + plan.x_scales_at)[row];
        else if (sizeof(W) == 1)
          factor = args.x_scale[row];
        routing.slots(assignment, &token, &slot);
        if (kLayout == MoeLayout::kPlain && args.topk_weights)
          factor *= args.topk_weights[token * args.topk_weights_stride + slot];
      }
      mine.factor[member] = factor;
    }
    if constexpr (kWide)
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int n = 0; n < kGroups; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h) widen(x[step][n][h], wide[step][n][h]);
  };

  const auto skip = [&](uint32_t granules) {  // fewer than there are stages
    ring.stage += granules;
    if (ring.stage < plan.stages) return;
    ring.stage -= plan.stages;
    ring.parity ^= 1;
  };
  if (kTeams == 2) skip(team * plan.steps);
  for (uint32_t at = lists.items->first + team;; at += kTeams) {
    uint32_t item, tile;
    {
      const auto items = reinterpret_cast<const MoeItems*>(memory_now() + plan.items_at);
      if (at >= items->end) break;
      args.tiles(at, &item, &tile);
      if (tile < kTeams || at == items->first + team) begin_pass(item);
    }
    float sums[kGroups][4] = {}, scale[2] = {};
    for (uint32_t first = 0; first < plan.steps; first += kSteps) {
#pragma unroll
      for (int slot = 0; slot < kSteps; ++slot) {
        const uint32_t step = first + slot;
        if (step >= plan.steps) break;
        wait_barrier(ring.full(), ring.parity);
        uint32_t other = 0;
        if constexpr (sizeof(W) == 1)
          if (step == 0) {
            const float* const from =
                reinterpret_cast<const float*>(memory_now() + plan.scales_at) + ring.stage * kTileRows;
            scale[0] = from[member % kWidth];
            if (kLayout != MoeLayout::kPlain) scale[1] = from[8 + member % kWidth];
            other = __float_as_uint(scale[0]) | __float_as_uint(scale[1]);
          }
        const uint32_t first_chunk = ring.address() + weight_lane.chunk[0];
        // Chunk by chunk, and all loads count for the release: ptxas may issue any of them last.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t from = first_chunk ^ h << 4;
          const uint4 upper = load_shared(from), lower = load_shared(from + 8 * kSlabPitch);
#pragma unroll
          for (int n = 0; n < kGroups; ++n) {
            if constexpr (kWide)
              multiply(sums[n], upper, lower, wide[slot][n][h]);
            else
              multiply<W>(sums[n], sums[n], upper, lower, x[slot][n][h]);
          }
          other |= upper.x | lower.x;
        }
        ring.release(other);
        ring.advance();
        if constexpr (kStreamed) load_input(slot, step + kSteps < plan.steps ? step + kSteps : slot);
      }
      if constexpr (!kStreamed) break;
    }
    // Of two buffers in turn: one is free again when its readers have come to the barrier of the next tile.
    unsigned char* const now = memory_now();
    if (kTeams == 2) skip(plan.steps);
    uint32_t thread = member;
    compute_now(thread);
    float* const partial = reinterpret_cast<float*>(now + plan.partial_at) +
                           (team * 2 + at / kTeams % 2) * plan.warps * kCount * kPartialPitch;
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
      store_partial(partial + thread / kWarp * kCount * kPartialPitch, sums[n], n * 8, kCount, thread % kWarp);
    sync_threads(1 + team, threads);
    compute_now(at);
    args.tiles(at, &item, &tile);
    finish_tile<W, kLayout, kGroups>(
        args, partial, reinterpret_cast<const int32_t*>(now + plan.listed_at) + item * kCount,
        reinterpret_cast<const MoeColumns<kGroups>*>(now + plan.columns_at)[team * 2 + item % 2], scale, tile, thread);
  }
#endif
}

// The weights as [expert][slab][half][row][column], or [expert][1][half][row][column] where the last slab is a part of
// one. A box has the rows of a tile: of two panels eight of either.
template <class W>
CUtensorMap weight_map(const MoeArgs& a, const MoeWarpPlan& plan) {
  constexpr uint32_t kColumns = kSlabPitch / sizeof(W);
  const uint32_t halves = a.panels;
  const ExpertWeights& w = a.panel[plan.swapped ? 1 : 0];
  constexpr int64_t kPart = 16 / sizeof(W);
  const int64_t row = a.width == 1 ? (a.depth + kPart - 1) / kPart * kPart : w.row_stride;
  const int64_t expert = a.experts == 1 ? a.width * row : w.expert_stride;
  int64_t half = a.width * row;
  if (halves == 2) half = static_cast<const W*>(a.panel[plan.swapped ? 0 : 1].data) - static_cast<const W*>(w.data);
  return tensor_map({dtype_of<W>,
                     w.data,
                     {plan.boxes ? kColumns : a.depth, a.width, halves, plan.boxes ? a.depth / kColumns : 1, a.experts},
                     {1, row, half, kColumns, expert},
                     {kColumns, kTileRows / halves, halves, plan.boxes ? plan.warps : 1, 1}});
}

inline MoeRouting routing_of(const MoeArgs& a, const MoeWarpPlan& plan) {
  const int count = kMoeWarpKernels[plan.kernel].groups * 8;
  return {a.sorted_token_ids,
          a.expert_ids,
          a.num_tokens_post_pad,
          a.sorted_token_ids ? nullptr : a.ids,
          a.expert_map,
          a.ids_stride,
          Divider<uint32_t>(a.slots),
          Divider<uint32_t>(a.sorted_token_ids ? a.block_m / count : 1),
          static_cast<uint32_t>(a.positions),
          static_cast<uint32_t>(a.assignments()),
          static_cast<uint32_t>(a.experts),
          static_cast<uint32_t>(a.routed),
          plan.candidates,
          plan.words,
          a.settled};
}

template <class W, class Out>
MoeWarpArgs<Out> warp_args(const MoeArgs& a, const MoeWarpPlan& plan, Out* out, int64_t out_stride) {
  return {weight_map<W>(a, plan),
          out,
          static_cast<const char*>(a.x),
          a.x_scale,
          {a.panel[plan.swapped].scale, a.panel[!plan.swapped].scale},
          a.topk_weights,
          out_stride,
          a.x_rows.inner_stride * size_of(a.quantize_from.value_or(a.dtype)),
          a.panel[0].scale_stride,
          a.topk_weights_stride,
          routing_of(a, plan),
          Divider<uint32_t>(a.slots_per_row),
          Divider<uint32_t>(plan.tiles),
          Divider<uint32_t>(plan.blocks),
          static_cast<uint32_t>(a.width),
          static_cast<uint32_t>(a.depth * sizeof(W)),
          a.gate.value_or(Gate{}),
          plan};
}

template <class W, class X, class Out, MoeLayout kLayout>
void launch_tile(Stream stream, const MoeArgs& a, const MoeWarpPlan& plan, Out* out, int64_t out_stride) {
  const MoeWarpArgs<Out> args = warp_args<W>(a, plan, out, out_stride);
  const int threads = moe_threads(kMoeWarpKernels[plan.kernel], plan.warps);
  const LaunchShape shape{plan.blocks, threads, 1, plan.shared_bytes};
  if constexpr (sizeof(W) < sizeof(X)) return launch<moe_warp_kernel<W, X, Out, kLayout, 3>>(stream, shape, args);
  [&]<int... kKernel>(std::integer_sequence<int, kKernel...>) {
    ((plan.kernel == kKernel ? launch<moe_warp_kernel<W, W, Out, kLayout, kKernel>>(stream, shape, args) : void()),
     ...);
  }
  (std::make_integer_sequence<int, moe_warp_kernels(sizeof(W) == 1)>());
}

template <class W>
void launch_moe_warp(Stream stream, const MoeArgs& a, const MoeWarpPlan& plan) {
  using Out = std::conditional_t<sizeof(W) == 1, bf16, W>;
  const int64_t stride = a.out_rows.inner_stride;
  const auto out = a.out.ptr<Out>();
  if (a.out.dtype == DType::kF32) {
    const auto sums = a.out.ptr<float>();
    if (a.panels == 1) return launch_tile<W, W, float, MoeLayout::kPlain>(stream, a, plan, sums, stride);
    if constexpr (sizeof(W) == 1) {
      if (a.quantize_from == DType::kBF16)
        return launch_tile<W, bf16, float, MoeLayout::kGated>(stream, a, plan, sums, stride);
      if (a.quantize_from == DType::kF16)
        return launch_tile<W, f16, float, MoeLayout::kGated>(stream, a, plan, sums, stride);
      return launch_tile<W, W, float, MoeLayout::kGated>(stream, a, plan, sums, stride);
    }
  }
  if (a.panels == 1) return launch_tile<W, W, Out, MoeLayout::kPlain>(stream, a, plan, out, stride);
  if (!a.gate) return launch_tile<W, W, Out, MoeLayout::kPair>(stream, a, plan, out, stride);
  launch_tile<W, W, Out, MoeLayout::kGated>(stream, a, plan, out, stride);
}

}  // namespace kestrel::cuda
