// A row stays in registers up to 4096 wide: of a block, or, where there are many and they are up to 1024 wide, of a
// warp. Longer ones, and those that vectors do not fit, are read twice. Bound by its launch at few rows, by memory at
// many: 5 bytes an element.
#include <algorithm>

#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/launch.h"
#include "ops/fp8_quant/absmax.cuh"
#include "ops/fused_moe/requantize.h"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSize = 4;  // of a vector
constexpr int64_t kManyRows = 4096;

template <int kVec>
__device__ __forceinline__ uint32_t absmax(const Vec<float, kVec>& x) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const uint32_t magnitude = x.words[i] & 0x7fffffff;
    largest = max(largest, magnitude > 0x7f800000 ? 0 : magnitude);  // less NaN
  }
  return largest;
}

template <int kVec>
__device__ __forceinline__ Vec<e4m3, kVec> quantize(const Vec<float, kVec>& x, float reciprocal) {
  float f[kVec];
  to_floats(x, f);
#pragma unroll
  for (int i = 0; i < kVec; ++i) f[i] = __fmul_rn(f[i], reciprocal);
  return from_floats<e4m3>(f);
}

__device__ __forceinline__ float scale_of(uint32_t magnitude) {
  return fmaxf(__fdiv_rn(__uint_as_float(magnitude), 448.0f), kSmallestScale);
}

// kLanes threads of a row.
template <int kLanes, int kVectors>
__global__ void __launch_bounds__(kThreads) requantize_kernel(const __grid_constant__ RequantizeArgs args) {
  release_successor();  // at once: what down reads before its wait is older than up, which has triggered after its own
  wait_for_predecessor();
  const int64_t row = blockIdx.x * int64_t{kThreads / kLanes} + threadIdx.x / kLanes;
  if (row >= args.rows) return;  // whole warps, and no block that has one row
  const float* const values = args.values + row * args.values_stride;
  e4m3* const bits = args.bits + row * args.bits_stride;
  const int width = static_cast<int>(args.width), lane = threadIdx.x % kLanes;
  const auto column = [&](int v) { return (lane + v * kLanes) * kSize; };
  Vec<float, kSize> x[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    x[v] = {};
    if (column(v) < width) x[v] = load<kSize>(values + column(v));
  }
  uint32_t magnitude = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) magnitude = max(magnitude, absmax(x[v]));
  const float scale = scale_of(kLanes == kWarp ? warp_max(magnitude) : block_max(magnitude));
  if (lane == 0) args.scale[row] = scale;
  const float reciprocal = __frcp_rn(scale);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    if (column(v) < width) store(bits + column(v), quantize(x[v], reciprocal));
}

template <int kVec>
__global__ void __launch_bounds__(kThreads) requantize_reload_kernel(const __grid_constant__ RequantizeArgs args) {
  release_successor();  // at once: what down reads before its wait is older than up, which has triggered after its own
  wait_for_predecessor();
  const float* const row = args.values + blockIdx.x * args.values_stride;
  e4m3* const bits = args.bits + blockIdx.x * args.bits_stride;
  uint32_t magnitude = 0;
  for (int64_t i = threadIdx.x * kVec; i < args.width; i += kThreads * kVec)
    magnitude = max(magnitude, absmax(load<kVec>(row + i)));
  const float scale = scale_of(block_max(magnitude)), reciprocal = __frcp_rn(scale);
  if (threadIdx.x == 0) args.scale[blockIdx.x] = scale;
  for (int64_t i = threadIdx.x * kVec; i < args.width; i += kThreads * kVec)
    store(bits + i, quantize(load<kVec>(row + i), reciprocal));
}

}  // namespace

void requantize(Stream stream, const RequantizeArgs& args) {
  if (args.rows == 0) return;
  const LaunchShape shape{args.rows, kThreads};
  constexpr int64_t kStep = kThreads * kSize;
  const bool vectors = args.width % kSize == 0 && args.values_stride % kSize == 0 && args.bits_stride % kSize == 0 &&
                       aligned_to(args.values, kSize * sizeof(float)) && aligned_to(args.bits, kSize);
  if (!vectors) return launch<requantize_reload_kernel<1>>(stream, shape, args);
  constexpr int kOfWarp = 8;  // vectors of a lane
  if (args.rows >= kManyRows && args.width <= kOfWarp * kWarp * kSize)
    return launch<requantize_kernel<kWarp, kOfWarp>>(stream, {ceil_div(args.rows, kThreads / kWarp), kThreads}, args);
  if (args.width <= kStep) return launch<requantize_kernel<kThreads, 1>>(stream, shape, args);
  if (args.width <= 2 * kStep) return launch<requantize_kernel<kThreads, 2>>(stream, shape, args);
  if (args.width <= 4 * kStep) return launch<requantize_kernel<kThreads, 4>>(stream, shape, args);
  launch<requantize_reload_kernel<kSize>>(stream, shape, args);
}

}  // namespace kestrel::cuda
