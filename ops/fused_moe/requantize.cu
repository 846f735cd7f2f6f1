// A block per row, which stays in registers up to 4096 wide; longer ones, and those that vectors do not fit, are read
// twice. Bound by its launch at few rows, by memory at many: 5 bytes an element.
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

// Of the block's row, in every thread; stored too.
__device__ __forceinline__ float scale_of(const RequantizeArgs& args, uint32_t magnitude) {
  const float scale = fmaxf(__fdiv_rn(__uint_as_float(block_max(magnitude)), 448.0f), kSmallestScale);
  if (threadIdx.x == 0) args.scale[blockIdx.x] = scale;
  return scale;
}

template <int kVectors>
__global__ void __launch_bounds__(kThreads) requantize_kernel(const __grid_constant__ RequantizeArgs args) {
  release_successor();  // at once: what down reads before its wait is older than up, which has triggered after its own
  wait_for_predecessor();
  const float* const row = args.values + blockIdx.x * args.values_stride;
  e4m3* const bits = args.bits + blockIdx.x * args.bits_stride;
  const int width = static_cast<int>(args.width);
  const auto column = [&](int v) { return static_cast<int>(threadIdx.x + v * kThreads) * kSize; };
  Vec<float, kSize> x[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    x[v] = {};
    if (column(v) < width) x[v] = load<kSize>(row + column(v));
  }
  uint32_t magnitude = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) magnitude = max(magnitude, absmax(x[v]));
  const float reciprocal = __frcp_rn(scale_of(args, magnitude));
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
  const float reciprocal = __frcp_rn(scale_of(args, magnitude));
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
  if (args.width <= kStep) return launch<requantize_kernel<1>>(stream, shape, args);
  if (args.width <= 2 * kStep) return launch<requantize_kernel<2>>(stream, shape, args);
  if (args.width <= 4 * kStep) return launch<requantize_kernel<4>>(stream, shape, args);
  launch<requantize_reload_kernel<kSize>>(stream, shape, args);
}

}  // namespace kestrel::cuda
