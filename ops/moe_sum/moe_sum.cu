// A thread adds one vector of 16 bytes over all k, in order; the grid is flat over the vectors of all tokens. Strides
// that are no multiple of 16 bytes, odd widths and unaligned addresses go element by element.
// Bound by memory, K + 1 elements moved for each one written: all 8 loads are on their way before the first addition.
#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/launch.h"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 128;  // a single token of 2048 then takes two SMs
// Registers for 8 loads at once: left alone, ptxas puts 4 of them behind the first additions.
constexpr int kMinBlocks = 10;

template <class T>
struct VectorArgs {
  T* out;
  const T* x;
  int64_t out_stride, token_stride, expert_stride;
  Divider<uint32_t> vectors_per_row;
  uint32_t vectors;
  int experts;
};

template <class T, int kSize>
__device__ __forceinline__ void add(float (&sum)[kSize], const Vec<T, kSize>& v) {
  float f[kSize];
  to_floats(v, f);
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum[i] += f[i];
}

// kExperts is K, or 0 for any: args.experts.
template <class T, int kExperts>
__global__ void __launch_bounds__(kThreads, kMinBlocks) moe_sum_kernel(const __grid_constant__ VectorArgs<T> args) {
  constexpr int kVec = kVec16<T>;
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  uint32_t token, column;
  args.vectors_per_row(vector, &token, &column);
  const T* x = args.x + token * args.token_stride + uint64_t{column} * kVec;
  if (kExperts > 0 && starts_early() && vector < args.vectors) {
#pragma unroll
    for (int k = 0; k < kExperts; ++k) prefetch_line(x + k * args.expert_stride);
  }
  wait_for_predecessor();
  release_successor();
  if (vector >= args.vectors) return;
  float sum[kVec] = {};  // 0 + x: the sum of one -0 is 0, as on the CPU
  if constexpr (kExperts > 0) {
    Vec<T, kVec> terms[kExperts];
#pragma unroll
    for (int k = 0; k < kExperts; ++k) terms[k] = load<kVec>(x + k * args.expert_stride);
#pragma unroll
    for (int k = 0; k < kExperts; ++k) add(sum, terms[k]);
  } else {
#pragma unroll 4
    for (int k = 0; k < args.experts; ++k, x += args.expert_stride) add(sum, load<kVec>(x));
  }
  store(args.out + token * args.out_stride + uint64_t{column} * kVec, from_floats<T>(sum));
}

template <class T>
struct ElementArgs {
  T* out;
  const T* x;
  int64_t out_stride, token_stride, expert_stride, experts, width, elements;
};

template <class T>
__global__ void __launch_bounds__(kThreads) moe_sum_element_kernel(const __grid_constant__ ElementArgs<T> args) {
  wait_for_predecessor();
  release_successor();
  const int64_t element = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (element >= args.elements) return;
  const int64_t token = element / args.width, column = element % args.width;
  const T* x = args.x + token * args.token_stride + column;
  float sum = 0;
#pragma unroll 4
  for (int64_t k = 0; k < args.experts; ++k, x += args.expert_stride) sum += to_float(*x);
  args.out[token * args.out_stride + column] = from_float<T>(sum);
}

template <class T>
void choose(Stream stream, const Tensor& out, const Tensor& x) {
  constexpr int kVec = kVec16<T>;
  const int64_t tokens = x.shape[0], experts = x.shape[1], width = x.shape[2];
  const int64_t per_row = width / kVec, vectors = tokens * per_row;
  const bool fit = aligned_to(out.data, 16) && aligned_to(x.data, 16) && out.stride[0] % kVec == 0 &&
                   x.stride[0] % kVec == 0 && x.stride[1] % kVec == 0 && width % kVec == 0;
  if (fit && fits_32_bits(vectors + kThreads) && fits_32_bits(experts)) {
    const VectorArgs<T> args{out.ptr<T>(),
                             x.ptr<T>(),
                             out.stride[0],
                             x.stride[0],
                             x.stride[1],
                             Divider<uint32_t>(per_row),
                             static_cast<uint32_t>(vectors),
                             static_cast<int>(experts)};
    const LaunchShape shape{ceil_div(vectors, kThreads), kThreads};
    experts == 8 ? launch<moe_sum_kernel<T, 8>>(stream, shape, args)
                 : launch<moe_sum_kernel<T, 0>>(stream, shape, args);
  } else {
    const ElementArgs<T> args{out.ptr<T>(), x.ptr<T>(), out.stride[0], x.stride[0],
                              x.stride[1],  experts,    width,         tokens * width};
    launch<moe_sum_element_kernel<T>>(stream, {ceil_div(args.elements, kThreads), kThreads}, args);
  }
}

}  // namespace

void moe_sum(Stream stream, const Tensor& out, const Tensor& x) {
  dispatch<bf16, f16, float>(x.dtype, [&]<class T>() { choose<T>(stream, out, x); });
}

}  // namespace kestrel::cuda
