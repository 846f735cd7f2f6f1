// Tuned rows: kLanes threads hold a row in registers, kVectors vectors each. Mean and sum of squared deviations of
// each thread's elements, exact in two passes, are joined pairwise (Chan, Golub and LeVeque, 1979), so threads exchange
// once. Other rows and `reload`: a block per row that reads x three times, from L1 after the first.
// Bound by memory: 4 bytes an element; a copy of 9477 x 1152 takes 11.5 us, this 11.7.
#include <algorithm>

#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/warp.cuh"
#include "kestrel/launch.h"
#include "ops/layernorm/args.h"

namespace kestrel::cuda {
namespace {

template <class T>
struct TileArgs {
  T* out;
  const T* x;
  const T* weight;
  const T* bias;
  int64_t out_stride, x_stride, rows;
  float eps;
};

template <class T>
struct ReloadArgs {
  T* out;
  const T* x;
  const T* weight;
  const T* bias;
  Rows out_rows, x_rows;
  int width;
  float eps;
};

struct Moments {
  float mean;
  float m2;  // sum of squared deviations from the mean
};

// kLanes threads of a row, kVectors vectors of a thread, kSize elements of a vector. A type, since nvcc 13.0 cannot
// take a struct's value as the template argument of a kernel.
template <int lanes, int vectors, int size, int blocks>
struct Tile {
  static constexpr int kBlocks = blocks;  // of an SM at least: bounds the registers
  static constexpr int kLanes = lanes, kVectors = vectors, kSize = size;
  static constexpr int kShare = vectors * size;  // elements of a thread
  static constexpr int kWidth = lanes * kShare;
};
// Two rows in a block of two warps at 1152; 16 lanes with 16-byte vectors need 230 registers and take 15 us at 9477.
using Tile1152 = Tile<32, 9, 4, 10>;
using Tile2048 = Tile<64, 4, 8, 12>;
constexpr int kTileThreads = 64;

template <int kLanes>
__device__ __forceinline__ Moments join(Moments mine, float count) {
#pragma unroll
  for (int lane = 1; lane < kWarp; lane *= 2) {
    const float mean = shuffle_xor(mine.mean, lane), m2 = shuffle_xor(mine.m2, lane), delta = mean - mine.mean;
    mine = {0.5f * (mine.mean + mean), mine.m2 + m2 + delta * delta * (0.5f * count)};
    count *= 2;
  }
  if constexpr (kLanes > kWarp) {
    constexpr int kWarps = kLanes / kWarp;
    __shared__ Moments warps[kWarps];
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
    __syncthreads();
    Moments all{0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all.mean += warps[w].mean / kWarps;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float delta = warps[w].mean - all.mean;
      all.m2 += warps[w].m2 + delta * delta * count;
    }
    return all;
  }
  return mine;
}

template <class T, class Tile>
__global__ void __launch_bounds__(kTileThreads, Tile::kBlocks)
    layernorm_kernel(const __grid_constant__ TileArgs<T> args) {
  static_assert(Tile::kLanes <= kTileThreads && Tile::kLanes % kWarp == 0);
  using V = Vec<T, Tile::kSize>;
  const int lane = threadIdx.x % Tile::kLanes;
  const int64_t row = blockIdx.x * int64_t{kTileThreads / Tile::kLanes} + threadIdx.x / Tile::kLanes;
  const auto column = [&](int v) { return (lane + v * Tile::kLanes) * Tile::kSize; };
  const T* x_row = args.x + row * args.x_stride;
  V x[Tile::kVectors], weight[Tile::kVectors], bias[Tile::kVectors];
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
    weight[v] = load<Tile::kSize>(args.weight + column(v));
    bias[v] = load<Tile::kSize>(args.bias + column(v));
  }
  compute_now(x_row);
  if (row < args.rows) {  // of many rows, too: 2916x1152 4.40 us instead of 4.90 (3.7 instead of 3.5 from L2)
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v) prefetch_line(x_row + column(v));
  }
  wait_and_release(args.rows);
  if (row >= args.rows) return;  // whole warps: a row of more lanes has its block alone
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) x[v] = load<Tile::kSize>(x_row + column(v));

  float partial[4] = {};
  float f[Tile::kSize], w[Tile::kSize], b[Tile::kSize];
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
    to_floats(x[v], f);
#pragma unroll
    for (int i = 0; i < Tile::kSize; ++i) partial[i % 4] += f[i];
  }
  Moments mine{(partial[0] + partial[1] + partial[2] + partial[3]) * (1.0f / Tile::kShare), 0};
  partial[0] = partial[1] = partial[2] = partial[3] = 0;
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
    to_floats(x[v], f);
#pragma unroll
    for (int i = 0; i < Tile::kSize; ++i) partial[i % 4] += (f[i] - mine.mean) * (f[i] - mine.mean);
  }
  mine.m2 = partial[0] + partial[1] + partial[2] + partial[3];
  const Moments all = join<Tile::kLanes>(mine, Tile::kShare);
  const float scale = rsqrtf(all.m2 * (1.0f / Tile::kWidth) + args.eps);

  T* out_row = args.out + row * args.out_stride;
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
    to_floats(x[v], f);
    to_floats(weight[v], w);
    to_floats(bias[v], b);
#pragma unroll
    for (int i = 0; i < Tile::kSize; ++i) f[i] = (f[i] - all.mean) * scale * w[i] + b[i];
    store(out_row + column(v), from_floats<T>(f));
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(1024) layernorm_reload_kernel(const __grid_constant__ ReloadArgs<T> args) {
  wait_and_release(gridDim.x);
  const T* x = args.x + args.x_rows.offset(blockIdx.x);
  T* out = args.out + args.out_rows.offset(blockIdx.x);
  const int width = args.width, first = threadIdx.x * kVec, step = blockDim.x * kVec;
  float f[kVec], w[kVec], b[kVec];
  float sum = 0;
  for (int i = first; i < width; i += step) {
    to_floats(load<kVec>(x + i), f);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum += f[j];
  }
  const float mean = block_sum(sum) / width;
  float m2 = 0;
  for (int i = first; i < width; i += step) {
    to_floats(load<kVec>(x + i), f);
#pragma unroll
    for (int j = 0; j < kVec; ++j) m2 += (f[j] - mean) * (f[j] - mean);
  }
  const float scale = rsqrtf(block_sum(m2) / width + args.eps);
  for (int i = first; i < width; i += step) {
    to_floats(load<kVec>(x + i), f);
    to_floats(load<kVec>(args.weight + i), w);
    to_floats(load<kVec>(args.bias + i), b);
#pragma unroll
    for (int j = 0; j < kVec; ++j) f[j] = (f[j] - mean) * scale * w[j] + b[j];
    store(out + i, from_floats<T>(f));
  }
}

template <class T, class Tile>
void run_tile(Stream stream, const LayernormArgs& a) {
  const TileArgs<T> args{a.out.ptr<T>(),          a.x.ptr<T>(),          a.weight.ptr<T>(), a.bias.ptr<T>(),
                         a.out_rows.inner_stride, a.x_rows.inner_stride, a.x_rows.count,    a.eps};
  launch<layernorm_kernel<T, Tile>>(stream, {ceil_div(args.rows, kTileThreads / Tile::kLanes), kTileThreads}, args);
}

template <class T, int kVec>
void run_reload(Stream stream, const LayernormArgs& a) {
  const ReloadArgs<T> args{a.out.ptr<T>(), a.x.ptr<T>(), a.weight.ptr<T>(),         a.bias.ptr<T>(),
                           a.out_rows,     a.x_rows,     static_cast<int>(a.width), a.eps};
  const int threads = static_cast<int>(std::min<int64_t>(ceil_div(ceil_div(a.width, kVec), kWarp) * kWarp, 1024));
  launch<layernorm_reload_kernel<T, kVec>>(stream, {a.x_rows.count, threads}, args);
}

template <class T>
void choose(Stream stream, const LayernormArgs& a) {
  constexpr int kVec = kVec16<T>;
  if (!vectors_fit<T, kVec>(a.out, a.out_rows) || !vectors_fit<T, kVec>(a.x, a.x_rows) ||
      !aligned_to(a.weight.data, 16) || !aligned_to(a.bias.data, 16) || a.width % kVec != 0)
    return run_reload<T, 1>(stream, a);
  if (!a.reload && a.out_rows.uniform() && a.x_rows.uniform()) {
    if (a.width == Tile1152::kWidth) return run_tile<T, Tile1152>(stream, a);
    if (a.width == Tile2048::kWidth) return run_tile<T, Tile2048>(stream, a);
  }
  run_reload<T, kVec>(stream, a);
}

}  // namespace

void layernorm(Stream stream, const LayernormArgs& args) {
  dispatch<bf16, f16>(args.x.dtype, [&]<class T>() { choose<T>(stream, args); });
}

}  // namespace kestrel::cuda
