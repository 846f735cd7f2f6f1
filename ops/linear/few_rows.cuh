// out = activation(x w^T + b) + residual at 1 to 16 rows; weight_stream.cuh has the main loop. A block takes a tile of
// 16 outputs after another (of a gate 8 of the first half and the 8 of the second that belong to them), the whole depth
// of each. One wave of blocks. Bound by the weights' bytes; where these are few, by the latency of x after the wait.
// What binds where a target is missed (H200, cold, us): 1x2048x8192 8.65 (8.2): 128 tiles on 132 SMs, 192 KB under way
// on each; a larger ring keeps the next kernel's blocks out, a smaller one starves the copies. 1x2048x2048 2.57 (2.5):
// latency. 16x2048x2048 3.96 (3.8), 16x51200x2048 50.5 (49.5): every SM fetches all of x from L2 after the wait.
#pragma once

#include <utility>

#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/weight_stream.cuh"
#include "kestrel/launch.h"
#include "kestrel/tensor_map.h"
#include "ops/linear/activate.cuh"
#include "ops/linear/few_rows.h"

namespace kestrel::cuda {

template <class T>
struct FewRowsArgs : FewRowsOperands<T> {
  FewRowsPlan plan;
  CUtensorMap map;  // of w; unset for WeightCopy::kRows
};

// Whether a kernel is for plain sums: its code is half as long then, and what runs after the wait is read from memory.
template <bool kPlain, class T>
__device__ __forceinline__ bool has_gate(const FewRowsArgs<T>& args) {
  return !kPlain && is_gate(args.kind);
}
// Outputs of a tile: 2 to this.
template <bool kPlain, class T>
__device__ __forceinline__ uint32_t width_bits(const FewRowsArgs<T>& args) {
  return has_gate<kPlain>(args) ? 3 : 4;
}

// The producer warp: all granules of the block's tiles in order.
template <bool kPlain, class T>
__device__ __forceinline__ void stream_weights(const FewRowsArgs<T>& args, Ring ring) {
  const FewRowsPlan& plan = args.plan;
  const uint32_t lane = threadIdx.x % kWarp, bits = width_bits<kPlain>(args), width = 1 << bits;
  const uint32_t total = (plan.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x * plan.steps;
  uint32_t first = blockIdx.x * width, step = 0;

  const auto issue = [&] {
    const uint32_t to = ring.address(), full = ring.full();
    if (plan.copy == WeightCopy::kRows) {
      const uint32_t bytes = plan.warps * kSlabPitch, half = lane >> bits, output = first + lane % width;
      const uint32_t height = min(width, args.columns - first) << (4 - bits);
      if (lane == 0) arrive_expecting(full, height * bytes);
      __syncwarp();
      if (lane < kTileRows && output < args.columns)
        copy_bulk(to + lane * (bytes + 16),
                  args.w + (int64_t{half} * args.columns + output) * args.w_stride + step * plan.warps * kSlabColumns,
                  bytes, full);
    } else {
      if (lane == 0) arrive_expecting(full, plan.stage_bytes);
      __syncwarp();
      if (plan.copy == WeightCopy::kBox) {
        if (lane == 0) copy_box(to, &args.map, 0, first, 0, step * plan.warps, full);
      } else if (lane < plan.warps) {
        copy_box(to + lane * kSlabBytes, &args.map, (step * plan.warps + lane) * kSlabColumns, first, 0, 0, full);
      }
    }
    if (++step == plan.steps) {
      step = 0;
      first += gridDim.x * width;
    }
    ring.advance();
  };

  ring.init(plan.warps);
  uint32_t issued = 0;
  for (; issued < min(plan.stages, total); ++issued) issue();
  __syncthreads();
  // The ring has gone round once: parity is 1, and the first phase of an empty barrier has parity 0.
  for (; issued < total; ++issued) {
    wait_barrier(ring.empty(), ring.parity ^ 1);
    issue();
  }
}

// Bias (before the wait) or residual (after it) of the block's first tiles to shared memory, by 16 bytes. Their latency
// would otherwise come once for each tile: 49152 x 576 takes 15.1 us then, 13.7 so.
template <bool kPlain, class T>
__device__ __forceinline__ void stage_bias(const FewRowsArgs<T>& args, uint32_t to) {
  const uint32_t bits = width_bits<kPlain>(args), threads = args.plan.warps * kWarp;
  for (uint32_t i = threadIdx.x; i < args.plan.staged_tiles * 2; i += threads) {
    const uint32_t first = (blockIdx.x + i / 2 * gridDim.x) << bits, chunk = i % 2;
    if (bits == 3)
      copy_async(to + i * 16, args.bias + chunk * args.columns + first);
    else if (first + chunk * 8 < args.columns)
      copy_async(to + i * 16, args.bias + first + chunk * 8);
  }
}
template <bool kPlain, class T>
__device__ __forceinline__ void stage_residual(const FewRowsArgs<T>& args, uint32_t to) {
  const uint32_t bits = width_bits<kPlain>(args), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t chunks = args.rows << (bits - 3);
  for (uint32_t count = warp; count < args.plan.staged_tiles; count += args.plan.warps) {
    const uint32_t first = (blockIdx.x + count * gridDim.x) << bits;
    for (uint32_t i = lane; i < chunks; i += kWarp) {
      const uint32_t row = i >> (bits - 3), column = first + (bits == 3 ? 0 : i % 2 * 8);
      if (column < args.columns)
        copy_async(to + (count * chunks + i) * 16, args.residual + row * args.residual_stride + column);
    }
  }
}

// The outputs of the block's tile number `count`.
template <bool kPlain, int kMostWarps, class T>
__device__ __forceinline__ void finish_tile(const FewRowsArgs<T>& args, const unsigned char* memory,
                                            const float* partial, uint32_t count) {
  const FewRowsPlan& plan = args.plan;
  const bool gate = has_gate<kPlain>(args), staged = count < plan.staged_tiles;
  const uint32_t bits = width_bits<kPlain>(args), width = 1 << bits, first = (blockIdx.x + count * gridDim.x) << bits;
  for (uint32_t i = threadIdx.x; i < args.rows << bits; i += plan.warps * kWarp) {
    const uint32_t row = i >> bits, output = i % width, column = first + output;
    if (column >= args.columns) continue;
    const float* const sums = partial + row * kPartialPitch + output;
    float a = sum_partial<kMostWarps>(sums, plan.warps, args.rows * kPartialPitch), g = 0;
    if (gate) g = sum_partial<kMostWarps>(sums + 8, plan.warps, args.rows * kPartialPitch);
    if (args.bias) {
      if (staged) {
        const T* const bias = reinterpret_cast<const T*>(memory + plan.bias_at) + count * kTileRows + output;
        a += to_float(bias[0]);
        if (gate) g += to_float(bias[8]);
      } else {
        a += to_float(args.bias[column]);
        if (gate) g += to_float(args.bias[args.columns + column]);
      }
    }
    if constexpr (!kPlain) dispatch_kind(args.kind, [&]<LinearActivation kKind>() { a = activate<T, kKind>(a, g); });
    if (args.residual) {
      if (staged)
        a += to_float(
            reinterpret_cast<const T*>(memory + plan.residual_at)[((count * args.rows + row) << bits) + output]);
      else
        a += to_float(args.residual[row * args.residual_stride + column]);
    }
    args.out[row * args.out_stride + column] = from_float<T>(a);
  }
}

// x to shared memory, rows x_pitch bytes apart, with zeros past the depth.
template <class T>
__device__ __forceinline__ void copy_input(const FewRowsArgs<T>& args, uint32_t to) {
  const FewRowsPlan& plan = args.plan;
  const uint32_t chunks = plan.steps * plan.warps * 8;
  uint32_t row = 0, chunk = threadIdx.x;
  while (true) {
    for (; chunk >= chunks; chunk -= chunks) ++row;
    if (row >= args.rows) break;
    const bool valid = chunk * 8 < args.depth;
    copy_async(to + row * plan.x_pitch + chunk * 16, args.x + row * args.x_stride + (valid ? chunk * 8 : 0),
               valid ? 16 : 0);
    chunk += plan.warps * kWarp;
  }
}

template <class T, int kKernel, bool kPlain>
__global__ void __launch_bounds__((kFewRowsKernels[kKernel].warps + 1) * kWarp, kFewRowsKernels[kKernel].blocks)
    few_rows_kernel(const __grid_constant__ FewRowsArgs<T> args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr FewRowsKernel kThis = kFewRowsKernels[kKernel];
  constexpr int kGroups = kThis.groups, kSteps = kThis.steps, kMostWarps = kThis.warps;
  constexpr InputPlace kInput = kThis.input;
  constexpr int kChains = kGroups == 1 ? 2 : 1;  // of sums: more rows hide the latency of mma by themselves
  release_successor();  // the next product fills its ring meanwhile; nothing may be assumed complete before a wait
  extern __shared__ unsigned char unaligned[];
  const uint32_t base = (shared_address(unaligned) + 1023) & ~1023u;
  unsigned char* const memory = unaligned + (base - shared_address(unaligned));
  const FewRowsPlan& plan = args.plan;
  Ring ring{base, base + plan.barriers_at, plan.stages, plan.stage_bytes};
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warp == plan.warps) return stream_weights<kPlain>(args, ring);

  if (args.bias) stage_bias<kPlain>(args, base + plan.bias_at);
  const WeightLane weight_lane = plan.copy == WeightCopy::kRows
                                     ? WeightLane::in_rows(warp, lane, plan.warps * kSlabPitch + 16)
                                     : WeightLane::in_boxes(warp, lane);
  __syncthreads();
  wait_for_predecessor();

  // Rows of x past the last one make sums that nobody stores.
  [[maybe_unused]] uint4 x[kSteps][kGroups][2];
  [[maybe_unused]] const auto load_input = [&](int slot, uint32_t step) {
    const uint32_t column = (step * plan.warps + warp) * kSlabColumns + lane % 4 * 16;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const uint32_t row = n * 8 + lane / 4;
      const T* const from = args.x + row * args.x_stride + column;
#pragma unroll
      for (uint32_t h = 0; h < 2; ++h) {
        x[slot][n][h] = {};
        if (row < args.rows && column + h * 8 < args.depth)
          x[slot][n][h] = *reinterpret_cast<const uint4*>(from + h * 8);
      }
    }
  };
  [[maybe_unused]] uint32_t x_shared[kGroups];
  if constexpr (kInput == InputPlace::kShared) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
      x_shared[n] =
          base + plan.x_at + min(n * 8 + lane / 4, args.rows - 1) * plan.x_pitch + warp * kSlabPitch + lane % 4 * 32;
    copy_input(args, base + plan.x_at);
  } else {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_input(step, step);
  }
  if (args.residual) stage_residual<kPlain>(args, base + plan.residual_at);
  if constexpr (kInput == InputPlace::kShared) {
    wait_copies();
    sync_threads(1, plan.warps * kWarp);
  }

  const uint32_t partial_size = plan.warps * args.rows * kPartialPitch;
  float* partial = reinterpret_cast<float*>(memory + plan.partial_at);
  float* other_partial = partial + partial_size;
  for (uint32_t count = 0; blockIdx.x + count * gridDim.x < plan.tiles; ++count) {
    float sums[kChains][kGroups][4] = {};
    const auto multiply_granule = [&](int slot, uint32_t step) {
      wait_barrier(ring.full(), ring.parity);
      const Weights weights(ring.address(), weight_lane);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        if constexpr (kInput == InputPlace::kShared) {
          const uint32_t at = x_shared[n] + step * plan.warps * kSlabPitch;
          const uint4 values[2] = {load_shared(at), load_shared(at + 16)};
          multiply<T>(sums[0][n], sums[kChains - 1][n], weights, values);
        } else {
          multiply<T>(sums[0][n], sums[kChains - 1][n], weights, x[slot][n]);
        }
      }
      weights.release(ring);
      ring.advance();
    };
    for (uint32_t first = 0; first < plan.steps; first += kSteps) {
#pragma unroll
      for (int slot = 0; slot < kSteps; ++slot) {
        const uint32_t step = first + slot;
        if (step >= plan.steps) break;
        multiply_granule(slot, step);
        if constexpr (kInput == InputPlace::kStreamed)
          load_input(slot, step + kSteps < plan.steps ? step + kSteps : slot);
      }
      if constexpr (kInput == InputPlace::kRegisters) break;
    }
    if constexpr (kChains == 2)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][0][i] += sums[1][0][i];

#pragma unroll
    for (int n = 0; n < kGroups; ++n)
      store_partial(partial + warp * args.rows * kPartialPitch, sums[0][n], n * 8, args.rows);
    if (count == 0) wait_copies();
    sync_threads(1, plan.warps * kWarp);
    finish_tile<kPlain, kMostWarps>(args, memory, partial, count);
    std::swap(partial, other_partial);  // free again: its readers came to the barrier above after they had read it
  }
#endif
}

template <class T, int kKernel>
void launch_kernel(Stream stream, const FewRowsArgs<T>& args) {
  const FewRowsPlan& plan = args.plan;
  const LaunchShape shape{plan.blocks, static_cast<int>((plan.warps + 1) * kWarp), 1, plan.shared_bytes};
  if (args.kind == LinearActivation::kNone)
    launch<few_rows_kernel<T, kKernel, true>>(stream, shape, args);
  else
    launch<few_rows_kernel<T, kKernel, false>>(stream, shape, args);
}

// The weights as [slab][half][row][column], or [half][row][column] where the last slab is a part of one. A box has the
// rows of a tile: of a gate eight of either half, so that a thread, which has rows g and g + 8, has both.
template <class T>
CUtensorMap weight_map(const LinearArgs& a, const FewRowsPlan& plan) {
  const bool gate = is_gate(a.activation), whole = plan.copy == WeightCopy::kBox;
  const uint32_t halves = gate ? 2 : 1;
  const int64_t row = a.w.shape[0] == 1 ? a.depth : a.w.stride[0];
  return tensor_map({dtype_of<T>,
                     a.w.data,
                     {whole ? kSlabColumns : a.depth, a.columns, halves, whole ? a.depth / kSlabColumns : 1},
                     {1, row, a.columns * row, kSlabColumns},
                     {kSlabColumns, kTileRows / halves, halves, whole ? plan.warps : 1}});
}

template <class T>
void launch_few_rows(Stream stream, const LinearArgs& a, const FewRowsPlan& plan) {
  FewRowsArgs<T> args{FewRowsOperands<T>(a), plan, {}};
  if (plan.copy != WeightCopy::kRows) args.map = weight_map<T>(a, plan);
  [&]<int... kKernels>(std::integer_sequence<int, kKernels...>) {
    ((plan.kernel == kKernels ? launch_kernel<T, kKernels>(stream, args) : void()), ...);
  }
  (std::make_integer_sequence<int, kFewRowsKernelCount>());
}

}  // namespace kestrel::cuda
