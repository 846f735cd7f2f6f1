// Tuned rows: kLanes threads hold a row in registers, kVectors vectors each, and exchange one sum. Other rows: a block
// per row, which reads it twice, from L1 the second time. With a residual the row is the sum as it was stored.
// Bound by memory: 4 bytes an element, 8 with a residual. Few rows are bound by latency: weights come before the wait,
// all loads of a row before the first use.
#include <algorithm>
#include <limits>

#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/warp.cuh"
#include "kestrel/launch.h"
#include "ops/rmsnorm/args.h"

namespace kestrel::cuda {
namespace {

template <class T>
struct TileArgs {
  T* out;
  const T* x;
  const T* weight;
  T* residual;
  int64_t out_stride, x_stride, residual_stride;
  uint32_t rows;  // of out they share no byte, and each has 1 KB at least: 32 bits are enough
  float eps;
};

template <class T>
struct LoopArgs {
  T* out;
  const T* x;
  const T* weight;
  T* residual;
  Rows out_rows, x_rows, residual_rows;
  int width;
  float eps;
};

// kLanes threads of a row, kVectors vectors of a thread, kSize elements of a vector. A type, since nvcc 13.0 cannot
// take a struct's value as the template argument of a kernel.
template <int lanes, int vectors, int size>
struct Tile {
  static constexpr int kLanes = lanes, kVectors = vectors, kSize = size;
  static constexpr int kWidth = lanes * vectors * size;
};
// One tile for each width, so that a row's bits do not depend on how many there are.
using Tile576 = Tile<32, 9, 2>;
using Tile1152 = Tile<32, 9, 4>;
template <class T>
using Tile2048 = Tile<64, 2048 / 64 / kVec16<T>, kVec16<T>>;
constexpr int kTileThreads = 64;
// Blocks on an SM: few enough to leave registers for all loads of a row at once. Left alone, ptxas stops at 64
// registers and puts loads of the residual behind the first use.
template <class T>
constexpr int kMinBlocks = sizeof(T) == 2 ? 12 : 8;

// In a fixed order, whichever threads of the block hold the row.
template <int kLanes>
__device__ __forceinline__ float row_sum(float value) {
  value = warp_sum(value);
  if constexpr (kLanes > kWarp) {
    __shared__ float warps[kLanes / kWarp];
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = 0;
#pragma unroll
    for (int w = 0; w < kLanes / kWarp; ++w) value += warps[w];
  }
  return value;
}

template <class T, int kSize>
__device__ __forceinline__ void add_squares(float (&partial)[4], const Vec<T, kSize>& v) {
  float f[kSize];
  to_floats(v, f);
#pragma unroll
  for (int i = 0; i < kSize; ++i) partial[i % 4] = fmaf(f[i], f[i], partial[i % 4]);
}

__device__ __forceinline__ float total(const float (&partial)[4]) {
  return (partial[0] + partial[1]) + (partial[2] + partial[3]);
}

template <class T, int kSize>
__device__ __forceinline__ Vec<T, kSize> add(const Vec<T, kSize>& a, const Vec<T, kSize>& b) {
  float f[kSize], g[kSize];
  to_floats(a, f);
  to_floats(b, g);
#pragma unroll
  for (int i = 0; i < kSize; ++i) f[i] += g[i];
  return from_floats<T>(f);
}

template <class T, int kSize>
__device__ __forceinline__ Vec<T, kSize> scaled(const Vec<T, kSize>& x, const Vec<T, kSize>& weight, float scale) {
  float f[kSize], w[kSize];
  to_floats(x, f);
  to_floats(weight, w);
#pragma unroll
  for (int i = 0; i < kSize; ++i) f[i] *= scale * w[i];
  return from_floats<T>(f);
}

template <class T, class Tile, bool kResidual>
__global__ void __launch_bounds__(kTileThreads, kMinBlocks<T>)
    rmsnorm_kernel(const __grid_constant__ TileArgs<T> args) {
  static_assert((Tile::kLanes == kWarp || Tile::kLanes == kTileThreads) && kTileThreads % kWarp == 0);
  constexpr int kVectors = Tile::kVectors, kSize = Tile::kSize;
  const int lane = threadIdx.x % Tile::kLanes;
  const uint32_t row = blockIdx.x * (kTileThreads / Tile::kLanes) + threadIdx.x / Tile::kLanes;
  const auto column = [&](int v) { return (lane + v * Tile::kLanes) * kSize; };
  const T* x_row = args.x + row * args.x_stride;
  T* residual_row = kResidual ? args.residual + row * args.residual_stride : nullptr;
  Vec<T, kSize> x[kVectors], weight[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) weight[v] = load<kSize>(args.weight + column(v));
  if (starts_early() && row < args.rows) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      prefetch_line(x_row + column(v));
      if constexpr (kResidual) prefetch_line(residual_row + column(v));
    }
  }
  wait_and_release(args.rows);
  if (row >= args.rows) return;  // whole warps: a row of more lanes has its block alone
#pragma unroll
  for (int v = 0; v < kVectors; ++v) x[v] = load<kSize>(x_row + column(v));
  if constexpr (kResidual) {
    Vec<T, kSize> residual[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) residual[v] = load<kSize>(residual_row + column(v));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[v] = add(residual[v], x[v]);
      store(residual_row + column(v), x[v]);
    }
  }
  float partial[4] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) add_squares(partial, x[v]);
  const float mean = row_sum<Tile::kLanes>(total(partial)) * (1.0f / Tile::kWidth);
  const float scale = rsqrtf(mean + args.eps);
  T* out_row = args.out + row * args.out_stride;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) store(out_row + column(v), scaled(x[v], weight[v], scale));
}

template <class T, int kVec, bool kResidual>
__global__ void __launch_bounds__(1024) rmsnorm_loop_kernel(const __grid_constant__ LoopArgs<T> args) {
  wait_and_release(args.x_rows.count);
  const int first = threadIdx.x * kVec, step = blockDim.x * kVec;
  for (int64_t row = blockIdx.x; row < args.x_rows.count; row += gridDim.x) {
    const T* x = args.x + args.x_rows.offset(row);
    T* out = args.out + args.out_rows.offset(row);
    T* residual = kResidual ? args.residual + args.residual_rows.offset(row) : nullptr;
    float partial[4] = {};
    for (int i = first; i < args.width; i += step) {
      Vec<T, kVec> v = load<kVec>(x + i);
      if constexpr (kResidual) {
        v = add(load<kVec>(residual + i), v);
        store(residual + i, v);
      }
      add_squares(partial, v);
    }
    const float scale = rsqrtf(block_sum(total(partial)) / args.width + args.eps);
    const T* stored = kResidual ? residual : x;  // by this thread, where it reads
    for (int i = first; i < args.width; i += step)
      store(out + i, scaled(load<kVec>(stored + i), load<kVec>(args.weight + i), scale));
  }
}

template <class T, class Tile, bool kResidual>
void run_tile(Stream stream, const RmsnormArgs& a) {
  const TileArgs<T> args{a.out.ptr<T>(),
                         a.x.ptr<T>(),
                         a.weight.ptr<T>(),
                         kResidual ? a.residual->ptr<T>() : nullptr,
                         a.out_rows.inner_stride,
                         a.x_rows.inner_stride,
                         a.residual_rows.inner_stride,
                         static_cast<uint32_t>(a.x_rows.count),
                         a.eps};
  const LaunchShape shape{ceil_div(args.rows, kTileThreads / Tile::kLanes), kTileThreads};
  launch<rmsnorm_kernel<T, Tile, kResidual>>(stream, shape, args);
}

template <class T, int kVec, bool kResidual>
void run_loop(Stream stream, const RmsnormArgs& a) {
  const LoopArgs<T> args{a.out.ptr<T>(), a.x.ptr<T>(), a.weight.ptr<T>(), kResidual ? a.residual->ptr<T>() : nullptr,
                         a.out_rows,     a.x_rows,     a.residual_rows,   static_cast<int>(a.width),
                         a.eps};
  const int threads = static_cast<int>(std::min<int64_t>(ceil_div(ceil_div(a.width, kVec), kWarp) * kWarp, 1024));
  const int64_t blocks = std::min<int64_t>(a.x_rows.count, std::numeric_limits<int>::max());
  launch<rmsnorm_loop_kernel<T, kVec, kResidual>>(stream, {blocks, threads}, args);
}

template <class T, bool kResidual>
void choose(Stream stream, const RmsnormArgs& a) {
  constexpr int kVec = kVec16<T>;
  bool fit = vectors_fit<T, kVec>(a.out, a.out_rows) && vectors_fit<T, kVec>(a.x, a.x_rows) &&
             aligned_to(a.weight.data, 16) && a.width % kVec == 0;
  bool uniform = a.out_rows.uniform() && a.x_rows.uniform();
  if constexpr (kResidual) {
    fit = fit && vectors_fit<T, kVec>(*a.residual, a.residual_rows);
    uniform = uniform && a.residual_rows.uniform();
  }
  if (!fit) return run_loop<T, 1, kResidual>(stream, a);
  if (uniform) {
    if (a.width == Tile576::kWidth) return run_tile<T, Tile576, kResidual>(stream, a);
    if (a.width == Tile1152::kWidth) return run_tile<T, Tile1152, kResidual>(stream, a);
    if (a.width == Tile2048<T>::kWidth) return run_tile<T, Tile2048<T>, kResidual>(stream, a);
  }
  run_loop<T, kVec, kResidual>(stream, a);
}

}  // namespace

void rmsnorm(Stream stream, const RmsnormArgs& args) {
  dispatch<bf16, f16, float>(
      args.x.dtype, [&]<class T>() { args.residual ? choose<T, true>(stream, args) : choose<T, false>(stream, args); });
}

}  // namespace kestrel::cuda
