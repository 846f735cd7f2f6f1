// down with reduce at few tokens, in one kernel: a block has 16 outputs of all tokens and takes every pass of the list.
// Two teams of warps take passes in turn, so that one's sums over warps hide behind the other's products; what they
// make of an assignment stays in shared memory, and a token's are added in the order of its slots. Activations come
// from L2 to registers, one or two granules ahead; all of them to every block: 1/3 of what L2 gives at 64 tokens (fp8
// 42 us where the weights take 31), so that there the parts of a product are summed. Bound by the weights' bytes.
#pragma once

#include "ops/moe/warp.cuh"

namespace kestrel::cuda {

constexpr uint32_t kSumTeams = 2;

template <class W>
__device__ __forceinline__ void stream_sum(const MoeWarpArgs<std::conditional_t<sizeof(W) == 1, bf16, W>>& args,
                                           Ring ring, uint32_t base, const MoeLists& lists) {
  const MoeWarpPlan& plan = args.plan;
  const uint32_t count = lists.items->count;
  if (count == 0) return;
  bool around = false;
  for (uint32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x)
    for (uint32_t item = 0; item < count; ++item)
      for (uint32_t step = 0; step < plan.steps; ++step) {
        around |= ring.parity != 0;
        if (around) wait_barrier(ring.empty(), ring.parity ^ 1);
        copy_stage<W, MoeLayout::kPlain>(args, ring, base + plan.scales_at, tile * kTileRows, step, lists.expert[item]);
        ring.advance();
      }
}

template <class W>
__global__ void __launch_bounds__((kSumTeams * kMoeWarps + 1) * kWarp, 2)
    moe_warp_sum_kernel(const __grid_constant__ MoeWarpArgs<std::conditional_t<sizeof(W) == 1, bf16, W>> args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Out = std::conditional_t<sizeof(W) == 1, bf16, W>;
  constexpr uint32_t kCount = 8;
  extern __shared__ unsigned char unaligned[];
  const uint32_t base = (shared_address(unaligned) + 1023) & ~1023u;
  unsigned char* const memory = unaligned + (base - shared_address(unaligned));
  const MoeWarpPlan& plan = args.plan;
  const MoeRouting& routing = args.routing;
  Ring ring{base, base + plan.barriers_at, plan.stages, plan.stage_bytes};
  const MoeLists lists = lists_of<1>(args, memory);
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t team_threads = plan.warps * kWarp, threads = kSumTeams * team_threads;
  const bool producer = warp == kSumTeams * plan.warps;
  if (producer) {
    if (lane == 0) prefetch_map(&args.map);
    ring.init(plan.warps);
  }
  const auto results = reinterpret_cast<float*>(memory + plan.results_at);  // [assignment][row]
  for (uint32_t i = threadIdx.x; i < routing.assignments * kTileRows; i += blockDim.x) results[i] = 0;
  prepare_lists<1>(routing, lists);
  if (!routing.settled) {
    wait_for_predecessor();
    release_successor();
  }
  const uint32_t found = begin_lists<1>(routing, lists, producer);
  if (producer && lane == 0) lists.items->count = found;
  __syncthreads();
  if (producer) return stream_sum<W>(args, ring, base, lists);

  finish_lists<1>(routing, lists, threads);
  if (routing.settled) {
    wait_for_predecessor();
    release_successor();
  }
  const uint32_t team = warp / plan.warps, slab = warp % plan.warps, member = threadIdx.x % team_threads;
  const uint32_t count = lists.items->count;
  const WeightLane weight_lane = WeightLane::in_boxes(slab, lane);
  const auto skip = [&](uint32_t granules) {
    for (uint32_t i = 0; i < granules; ++i) ring.advance();
  };

  // Of the granule that comes kAhead later in this team's passes; past the last pass the last one once more.
  constexpr int kAhead = sizeof(W) == 2 ? 2 : 1;
  uint4 x[kAhead][2];
  uint32_t ahead_item = team, ahead_step = 0;
  const auto load_ahead = [&](int slot) {
    const int32_t* const listed = lists.listed + min(ahead_item, count - 1) * kCount + lane / 4;
    const uint32_t at = (ahead_step * plan.warps + slab) * kSlabPitch + lane % 4 * 32;
    const char* const from = args.x + *listed * args.x_stride + at;
#pragma unroll
    for (uint32_t h = 0; h < 2; ++h) {
      x[slot][h] = {};
      if (*listed >= 0 && at + h * 16 < args.depth_bytes) x[slot][h] = *reinterpret_cast<const uint4*>(from + h * 16);
    }
    if (++ahead_step == plan.steps) {
      ahead_step = 0;
      ahead_item += kSumTeams;
    }
  };
  const auto begin_tile = [&] {
    ahead_item = team;
    ahead_step = 0;
    if (count == 0) return;
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) load_ahead(slot);
  };
  begin_tile();

  const auto factors = reinterpret_cast<float*>(memory + plan.columns_at);  // of what is listed
  for (uint32_t i = threadIdx.x; i < count * kCount; i += threads) {
    const int32_t assignment = lists.listed[i];
    if (assignment < 0) continue;
    uint32_t token, slot;
    routing.slots(assignment, &token, &slot);
    float factor = args.topk_weights[token * args.topk_weights_stride + slot];
    if (sizeof(W) == 1) factor *= args.x_scale[assignment];
    factors[i] = factor;
  }
  sync_threads(1, threads);

  const uint32_t buffer_size = plan.warps * kCount * kPartialPitch;
  float* const partials = reinterpret_cast<float*>(memory + plan.partial_at) + team * 2 * buffer_size;
  uint32_t buffer = 0;
  for (uint32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    uint32_t item = team, step = 0;
    float sums[4] = {}, scale = 1;
    skip(min(team, count) * plan.steps);
    const auto take_granule = [&](int slot) {
      wait_barrier(ring.full(), ring.parity);
      uint32_t other = 0;
      if constexpr (sizeof(W) == 1)
        if (step == 0) {
          scale = reinterpret_cast<const float*>(memory + plan.scales_at)[ring.stage * kTileRows + member % kTileRows];
          other = __float_as_uint(scale);
        }
      const uint32_t first_chunk = ring.address() + weight_lane.chunk[0];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t from = first_chunk ^ h << 4;
        const uint4 upper = load_shared(from), lower = load_shared(from + 8 * kSlabPitch);
        multiply<W>(sums, sums, upper, lower, x[slot][h]);
        other |= upper.x | lower.x;
      }
      ring.release(other);
      ring.advance();
      load_ahead(slot);
      if (++step < plan.steps) return;
      // Of two buffers in turn: one is free again when its readers have come to the barrier of the next pass.
      float* const partial = partials + buffer * buffer_size;
      store_partial(partial + slab * kCount * kPartialPitch, sums, 0, kCount);
      for (float& sum : sums) sum = 0;
      sync_threads(1 + team, team_threads);
      for (uint32_t i = member; i < kCount * kTileRows; i += team_threads) {
        const uint32_t column = i / kTileRows, row = i % kTileRows;
        const int32_t assignment = lists.listed[item * kCount + column];
        if (assignment >= 0)
          results[assignment * kTileRows + row] =
              sum_partial<kMoeWarps>(partial + column * kPartialPitch + row, plan.warps, kCount * kPartialPitch) *
              (factors[item * kCount + column] * scale);
      }
      buffer ^= 1;
      step = 0;
      skip(min(kSumTeams - 1, count - item - 1) * plan.steps);
      item += kSumTeams;
    };
    while (item < count) {
      take_granule(0);
      if constexpr (kAhead == 2)
        if (item < count) take_granule(1);
    }
    begin_tile();
    sync_threads(3, threads);
    for (uint32_t i = threadIdx.x; i < plan.tokens * kTileRows; i += threads) {
      const uint32_t token = i / kTileRows, row = i % kTileRows, at = tile * kTileRows + row;
      float sum = 0;
      for (uint32_t slot = 0; slot < plan.slots; ++slot) sum += results[(token * plan.slots + slot) * kTileRows + row];
      if (at < args.width) args.out[token * args.out_stride + at] = from_float<Out>(sum);
    }
    sync_threads(3, threads);
  }
#endif
}

template <class W>
void launch_moe_warp_sum(Stream stream, const MoeArgs& a, const MoeWarpPlan& plan) {
  using Out = std::conditional_t<sizeof(W) == 1, bf16, W>;
  const auto args = warp_args<W>(a, plan, a.out.ptr<Out>(), a.out_rows.inner_stride);
  const LaunchShape shape{plan.blocks, static_cast<int>((kSumTeams * plan.warps + 1) * kWarp), 1, plan.shared_bytes};
  launch<moe_warp_sum_kernel<W>>(stream, shape, args);
}

}  // namespace kestrel::cuda
