// out = activation(x w^T + b) + residual at 1 to 16 rows where the weights are few: a block has 16 outputs (of a gate 8
// of the first half and the 8 of the second that belong to them) and the whole depth, a warp kSteps slabs of it, and
// all weights are in registers before the wait. Bound by latency from there on: fetch x, multiply, add up the warps,
// store. So all addresses are made before the wait, and no load from global memory but those of x and its like is in
// flight then: loads return in order, also those of other kernels' blocks on the SM (weights by plain loads: 1.7 us and
// not 0.9).
#pragma once

#include <utility>

#include "kestrel/hopper/fragment.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/weight_stream.cuh"
#include "kestrel/launch.h"
#include "ops/linear/activate.cuh"
#include "ops/linear/few_rows.h"

namespace kestrel::cuda {

template <class T, int kDepth, int kGroups, bool kPlain>
__global__ void __launch_bounds__(held_warps(kDepth) * kWarp, kGroups* held_steps(kDepth) <= 2 ? 2 : 1)
    held_weights_kernel(const __grid_constant__ FewRowsOperands<T> args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  release_successor();
  constexpr int kSteps = held_steps(kDepth), kWarps = held_warps(kDepth);
  constexpr uint32_t kPartialSize = kGroups * 8 * kPartialPitch, kRowBytes = kDepth * sizeof(T);
  constexpr uint32_t kPitch = held_pitch(kDepth);
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  extern __shared__ __align__(128) float partial[];  // then the weights, then the barrier
  const uint32_t memory = shared_address(partial + kWarps * kPartialSize), barrier = memory + kTileRows * kPitch;
  const bool gate = !kPlain && is_gate(args.kind);
  const uint32_t bits = gate ? 3 : 4, width = 1 << bits, first = blockIdx.x << bits;

  if (warp == 0) {
    if (lane == 0) {
      init_barrier(barrier, 1);
      fence_init_barrier();
      arrive_expecting(barrier, (min(width, args.columns - first) << (4 - bits)) * kRowBytes);
    }
    __syncwarp();
    const uint32_t half = lane >> bits, output = first + lane % width;
    if (lane < kTileRows && output < args.columns)
      copy_bulk(memory + lane * kPitch, args.w + (int64_t{half} * args.columns + output) * args.w_stride, kRowBytes,
                barrier);
  }

  // This thread's part of x, and of out.
  const uint32_t g = lane / 4, q = lane % 4;
  const T* x_rows[kGroups];
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    x_rows[n] = args.x + (n * 8 + g) * args.x_stride + warp * kSteps * kSlabColumns + q * 8;
    compute_now(x_rows[n]);
  }
  const uint32_t row = threadIdx.x >> bits, output = threadIdx.x % width, column = first + output;
  const bool finishes = row < args.rows && column < args.columns;
  T* out = args.out + row * args.out_stride + column;
  const T* residual = args.residual + row * args.residual_stride + column;
  const T* bias = args.bias + column;
  compute_now(out);
  compute_now(residual);
  compute_now(bias);
  const bool has_bias = finishes && args.bias, has_residual = finishes && args.residual;
  if (has_bias) {
    prefetch(bias);
    if (gate) prefetch(bias + args.columns);
  }

  // Chunks q and q + 4 of a slab, of x too: the four threads of a row read 64 adjacent bytes.
  const uint32_t at = g * kPitch + warp * kSteps * kSlabPitch + q * 16;
  const WeightLane weight_lane{{at, at + 64}, 8 * kPitch};
  Weights weights[kSteps];
  __syncthreads();
  wait_barrier(barrier, 0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) weights[step] = Weights(memory + step * kSlabPitch, weight_lane);
  wait_for_predecessor();

  uint4 x[kSteps][kGroups][2];
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        x[step][n][h] = {};
        if (n * 8 + g < args.rows)
          x[step][n][h] = *reinterpret_cast<const uint4*>(x_rows[n] + step * kSlabColumns + h * 32);
      }
  T added{}, biases[2] = {};
  if (has_residual) added = *residual;
  if (has_bias) {
    biases[0] = bias[0];
    if (gate) biases[1] = bias[args.columns];
  }

  constexpr int kChains = kGroups == 1 ? 2 : 1;
  float sums[kChains][kGroups][4] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int n = 0; n < kGroups; ++n) multiply<T>(sums[0][n], sums[kChains - 1][n], weights[step], x[step][n]);
  if constexpr (kChains == 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0][0][i] += sums[1][0][i];
#pragma unroll
  for (int n = 0; n < kGroups; ++n) store_partial(partial + warp * kPartialSize, sums[0][n], n * 8, args.rows);
  __syncthreads();
  if (!finishes) return;

  const float* const of_warps = partial + row * kPartialPitch + output;
  float a = sum_partial<kWarps>(of_warps, kWarps, kPartialSize) + to_float(biases[0]), b = 0;
  if constexpr (!kPlain) {
    if (gate) b = sum_partial<kWarps>(of_warps + 8, kWarps, kPartialSize) + to_float(biases[1]);
    dispatch_kind(args.kind, [&]<LinearActivation kKind>() { a = activate<T, kKind>(a, b); });
  }
  *out = from_float<T>(a + to_float(added));
#endif
}

template <class T>
void launch_held_weights(Stream stream, const LinearArgs& a, const HeldWeightsPlan& plan) {
  const FewRowsOperands<T> args(a);
  const auto run = [&]<int kDepth, int kGroups>() {
    const LaunchShape shape{plan.blocks, held_warps(kDepth) * kWarp, 1, plan.shared_bytes};
    if (a.activation == LinearActivation::kNone)
      launch<held_weights_kernel<T, kDepth, kGroups, true>>(stream, shape, args);
    else
      launch<held_weights_kernel<T, kDepth, kGroups, false>>(stream, shape, args);
  };
  [&]<int... kDepths>(std::integer_sequence<int, kDepths...>) {
    ((a.depth == kDepths
          ? plan.groups == 1 ? run.template operator()<kDepths, 1>() : run.template operator()<kDepths, 2>()
          : void()),
     ...);
  }
  (HeldDepths{});
}

}  // namespace kestrel::cuda
