// Rows up to 8192 wide stay in registers: kLanes threads hold a row, so x is read once; longer rows take a block each
// that reads x twice. The whole tensor takes three launches: out_scale becomes the floor, every block raises it to its
// own scale by an integer maximum (in any order the same), and the product reads x again, from L2 where it fits.
// Bound by memory, 3 bytes an element (5 for the whole tensor). Layouts the vectors do not fit go element by element.
#include <algorithm>

#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/value.cuh"
#include "kestrel/launch.h"
#include "ops/fp8_quant/args.h"
#include "ops/fp8_quant/quantize.cuh"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct RowArgs {
  e4m3* out;
  float* scale;
  const T* x;
  int64_t out_stride, x_stride, rows, width;
};

// Threads of a block: one row of several warps, or two rows of a warp each, so that SMs differ by little in their
// share.
template <int kLanes>
constexpr int kRowThreads = kLanes > kWarp ? kLanes : 64;

// kLanes threads of a row, kEach elements of each thread: all loads are issued at once. kSettled: beside the preceding
// kernel, which is waited for at the end alone, for those that follow. fp32 is of fused_moe alone, whose next kernel
// knows what it may read: released at once.
template <class T, int kLanes, int kEach, bool kSettled>
__global__ void __launch_bounds__(kRowThreads<kLanes>) fp8_quant_row_kernel(const __grid_constant__ RowArgs<T> args) {
  constexpr int kRows = kRowThreads<kLanes> / kLanes, kVec = kVec16<T>, kVectors = kEach / kVec;
  const int lane = threadIdx.x % kLanes, width = static_cast<int>(args.width);
  const int64_t row = blockIdx.x * int64_t{kRows} + threadIdx.x / kLanes;
  const auto column = [&](int v) { return (lane + v * kLanes) * kVec; };
  const T* x_row = args.x + row * args.x_stride;
  e4m3* out_row = args.out + row * args.out_stride;
  compute_now(x_row);
  if constexpr (sizeof(T) == 4) release_successor();
  if constexpr (!kSettled) {
    if (starts_early() && row < args.rows) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (column(v) < width) prefetch_line(x_row + column(v));
    }
    wait_for_predecessor();
  }
  release_successor();
  if (row >= args.rows) {  // whole warps
    if constexpr (kSettled) wait_for_predecessor();
    return;
  }
  Vec<T, kVec> x[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    x[v] = {};
    if (column(v) < width) x[v] = load<kVec>(x_row + column(v));
  }
  uint32_t magnitude = warp_max(absmax(x));
  if constexpr (kLanes > kWarp) {
    __shared__ uint32_t warps[kLanes / kWarp];
    if (lane % kWarp == 0) warps[lane / kWarp] = magnitude;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kLanes / kWarp; ++w) magnitude = max(magnitude, warps[w]);
  }
  const float scale = scale_of<T>(magnitude), reciprocal = reciprocal_of(scale);
  if (lane == 0) args.scale[row] = scale;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    Vec<e4m3, kVec> bits = scaled<e4m3>(x[v], reciprocal);
    compute_now(bits);  // here, so that the store alone is conditional, without a branch
    if (column(v) < width) store(out_row + column(v), bits);
  }
  if constexpr (kSettled) wait_for_predecessor();
}

template <class T, int kVec>
__global__ void __launch_bounds__(1024) fp8_quant_row_reload_kernel(const __grid_constant__ RowArgs<T> args) {
  if constexpr (sizeof(T) == 4) release_successor();
  wait_for_predecessor();
  release_successor();
  const int64_t first = threadIdx.x * kVec, step = blockDim.x * kVec;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T* x = args.x + row * args.x_stride;
    e4m3* out = args.out + row * args.out_stride;
    uint32_t magnitude = 0;
    for (int64_t i = first; i < args.width; i += step) {
      const Vec<T, kVec> vector[1] = {load<kVec>(x + i)};
      magnitude = max(magnitude, absmax(vector));
    }
    const float scale = scale_of<T>(block_max(magnitude)), reciprocal = reciprocal_of(scale);
    if (threadIdx.x == 0) args.scale[row] = scale;
    for (int64_t i = first; i < args.width; i += step) store(out + i, scaled<e4m3>(load<kVec>(x + i), reciprocal));
  }
}

// The rest is flat over the elements of all rows.
template <class T>
struct FlatArgs {
  e4m3* out;
  const T* x;
  int64_t out_stride, x_stride;
  Divider<uint32_t> vectors_per_row;
  uint32_t vectors;  // of kSize elements: 8 in absmax, 16 in quantize
  DeviceValue<float> scale;
  float* out_scale;
};

template <class T>
struct ElementArgs {
  e4m3* out;
  const T* x;
  int64_t out_stride, x_stride, width, elements;
  DeviceValue<float> scale;
  float* out_scale;
};

__global__ void fp8_quant_reset_kernel(float* scale) {
  wait_for_predecessor();
  release_successor();
  *scale = kSmallestScale;
}

// Scales are positive, so their bits are ordered like their values, and the largest scale is that of the largest value.
template <class T>
__device__ __forceinline__ void raise(float* scale, uint32_t magnitude) {
  magnitude = block_max(magnitude);
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned*>(scale), __float_as_uint(scale_of<T>(magnitude)));
}

constexpr int kAbsmaxVectors = 4;  // of a thread

// Launched behind fp8_quant_reset_kernel, which triggers after its own wait: whatever wrote x is complete, so x is read
// before the wait. The same holds for the quantize kernel behind this one.
template <class T>
__global__ void __launch_bounds__(kThreads) fp8_quant_absmax_kernel(const __grid_constant__ FlatArgs<T> args) {
  Vec<T, 8> x[kAbsmaxVectors];
#pragma unroll
  for (int v = 0; v < kAbsmaxVectors; ++v) {
    const uint32_t vector = (blockIdx.x * kAbsmaxVectors + v) * kThreads + threadIdx.x;
    uint32_t row, column;
    args.vectors_per_row(vector, &row, &column);
    x[v] = {};
    if (vector < args.vectors) x[v] = load<8>(args.x + row * args.x_stride + int64_t{column} * 8);
  }
  wait_for_predecessor();
  release_successor();
  raise<T>(args.out_scale, absmax(x));
}

// kBehindAbsmax: the blocks go backwards over x, whose end is what L2 holds of a tensor too large for it.
template <class T, bool kBehindAbsmax>
__global__ void __launch_bounds__(kThreads) fp8_quant_kernel(const __grid_constant__ FlatArgs<T> args) {
  const uint32_t block = kBehindAbsmax ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const uint32_t vector = block * kThreads + threadIdx.x;
  uint32_t row, column;
  args.vectors_per_row(vector, &row, &column);
  const T* source = args.x + row * args.x_stride + int64_t{column} * 16;
  Vec<T, 8> x[2] = {};
  if constexpr (kBehindAbsmax) {
    if (vector < args.vectors) x[0] = load<8>(source), x[1] = load<8>(source + 8);
  }
  wait_for_predecessor();
  release_successor();
  if (vector >= args.vectors) return;
  if constexpr (!kBehindAbsmax) x[0] = load<8>(source), x[1] = load<8>(source + 8);
  const float scale = args.scale.at(0), reciprocal = kBehindAbsmax ? reciprocal_of(scale) : __frcp_rn(scale);
  const Vec<e4m3, 8> low = scaled<e4m3>(x[0], reciprocal), high = scaled<e4m3>(x[1], reciprocal);
  store(args.out + row * args.out_stride + int64_t{column} * 16,
        Vec<e4m3, 16>{low.words[0], low.words[1], high.words[0], high.words[1]});
}

constexpr int kAbsmaxElements = 16;  // of a thread

template <class T>
__global__ void __launch_bounds__(kThreads)
    fp8_quant_absmax_element_kernel(const __grid_constant__ ElementArgs<T> args) {
  wait_for_predecessor();
  release_successor();
  uint32_t magnitude = 0;
  for (int i = 0; i < kAbsmaxElements; ++i) {
    const int64_t element = (blockIdx.x * int64_t{kAbsmaxElements} + i) * kThreads + threadIdx.x;
    if (element >= args.elements) break;
    const int64_t row = element / args.width, column = element % args.width;
    const Vec<T, 1> x[1] = {load<1>(args.x + row * args.x_stride + column)};
    magnitude = max(magnitude, absmax(x));
  }
  raise<T>(args.out_scale, magnitude);
}

template <class T>
__global__ void __launch_bounds__(kThreads) fp8_quant_element_kernel(const __grid_constant__ ElementArgs<T> args) {
  wait_for_predecessor();
  release_successor();
  const int64_t element = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (element >= args.elements) return;
  const int64_t row = element / args.width, column = element % args.width;
  const float x = to_float(args.x[row * args.x_stride + column]);
  args.out[row * args.out_stride + column] = from_float<e4m3>(__fmul_rn(x, __frcp_rn(args.scale.at(0))));
}

template <class T, int kSize>
bool vectors_fit(const Tensor& t) {
  return kestrel::vectors_fit<T, kSize>(t, {t.shape[0], 1, t.shape[0] > 1 ? t.stride[0] : 0, 0});
}

template <class T, int kLanes, int kEach>
void run_row(Stream stream, const RowArgs<T>& args, bool settled) {
  constexpr int kBlock = kRowThreads<kLanes>;
  const LaunchShape shape{ceil_div(args.rows, kBlock / kLanes), kBlock};
  if constexpr (sizeof(T) == 2)
    if (settled) return launch<fp8_quant_row_kernel<T, kLanes, kEach, true>>(stream, shape, args);
  launch<fp8_quant_row_kernel<T, kLanes, kEach, false>>(stream, shape, args);
}

template <class T, int kVec>
void run_row_reload(Stream stream, const RowArgs<T>& args) {
  const int64_t warps = std::clamp<int64_t>(ceil_div(args.width, kVec * kWarp), 1, 32);
  launch<fp8_quant_row_reload_kernel<T, kVec>>(
      stream, {std::min<int64_t>(args.rows, 1 << 30), static_cast<int>(warps) * kWarp}, args);
}

// Up to so many rows, all on the device at once, a row has as many threads as it has vectors.
constexpr int64_t kFewRows = 1024;

template <class T>
void choose_row(Stream stream, const Fp8QuantArgs& a) {
  const RowArgs<T> args{a.out_bits.ptr<e4m3>(),
                        a.out_scale.ptr<float>(),
                        a.x.ptr<T>(),
                        a.out_bits.stride[0],
                        a.x.stride[0],
                        a.x.shape[0],
                        a.x.shape[1]};
  if (args.rows == 0) return;
  constexpr int kVec = kVec16<T>;
  if (!vectors_fit<T, kVec>(a.x) || !vectors_fit<e4m3, kVec>(a.out_bits) || args.width % kVec != 0)
    return run_row_reload<T, 1>(stream, args);
  const bool few = args.rows <= kFewRows;
  if (args.width <= 256) return run_row<T, 32, 8>(stream, args, a.settled);
  if (args.width <= 1024)
    return few ? run_row<T, 128, 8>(stream, args, a.settled) : run_row<T, 32, 32>(stream, args, a.settled);
  if (args.width <= 2048)
    return few ? run_row<T, 256, 8>(stream, args, a.settled) : run_row<T, 64, 32>(stream, args, a.settled);
  if (args.width <= 4096)
    return few ? run_row<T, 256, 16>(stream, args, a.settled) : run_row<T, 128, 32>(stream, args, a.settled);
  if (args.width <= 8192) return run_row<T, 256, 32>(stream, args, a.settled);
  run_row_reload<T, kVec>(stream, args);
}

template <class T>
void choose_flat(Stream stream, const Fp8QuantArgs& a) {
  const bool dynamic = a.mode != Fp8Scale::kGiven, together = a.x.contiguous() && a.out_bits.contiguous();
  float* const out_scale = dynamic ? a.out_scale.ptr<float>() : nullptr;
  DeviceValue<float> scale(a.given_scale);
  if (dynamic) {
    launch<fp8_quant_reset_kernel>(stream, {1, 1}, out_scale);
    scale.data = out_scale;
  }
  const int64_t elements = a.x.numel(), width = together ? elements : a.x.shape[1];
  if (elements == 0) return;
  if (width % 16 == 0 && vectors_fit<T, 8>(a.x) && vectors_fit<e4m3, 16>(a.out_bits) &&
      fits_32_bits(elements / 8 + kAbsmaxVectors * kThreads)) {
    FlatArgs<T> args{
        a.out_bits.ptr<e4m3>(), a.x.ptr<T>(), a.out_bits.stride[0], a.x.stride[0], {}, 0, scale, out_scale};
    if (dynamic) {
      args.vectors_per_row = Divider<uint32_t>(width / 8);
      args.vectors = static_cast<uint32_t>(elements / 8);
      launch<fp8_quant_absmax_kernel<T>>(stream, {ceil_div(args.vectors, kAbsmaxVectors * kThreads), kThreads}, args);
    }
    args.vectors_per_row = Divider<uint32_t>(width / 16);
    args.vectors = static_cast<uint32_t>(elements / 16);
    const LaunchShape shape{ceil_div(args.vectors, kThreads), kThreads};
    dynamic ? launch<fp8_quant_kernel<T, true>>(stream, shape, args)
            : launch<fp8_quant_kernel<T, false>>(stream, shape, args);
  } else {
    const ElementArgs<T> args{a.out_bits.ptr<e4m3>(),
                              a.x.ptr<T>(),
                              a.out_bits.stride[0],
                              a.x.stride[0],
                              a.x.shape[1],
                              elements,
                              scale,
                              out_scale};
    if (dynamic)
      launch<fp8_quant_absmax_element_kernel<T>>(stream, {ceil_div(elements, kAbsmaxElements * kThreads), kThreads},
                                                 args);
    launch<fp8_quant_element_kernel<T>>(stream, {ceil_div(elements, kThreads), kThreads}, args);
  }
}

}  // namespace

void fp8_quant(Stream stream, const Fp8QuantArgs& args) {
  dispatch<bf16, f16, float>(args.x.dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 2) {
      // One long row: all blocks share it, which is the whole tensor's way.
      if (args.mode != Fp8Scale::kRow || (args.x.shape[0] == 1 && args.x.shape[1] > 32768))
        return choose_flat<T>(stream, args);
    }
    choose_row<T>(stream, args);
  });
}

}  // namespace kestrel::cuda
