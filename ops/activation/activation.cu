// A thread makes one vector of 16 bytes of the output from one of each half; the grid is flat over the vectors of all
// rows. Rows of two strides, odd widths and unaligned addresses go element by element.
// Bound by memory, 3 elements moved for each one written: the same kernel without the gate is no faster at 5920 x 1024.
// Small calls are bound by latency, so a vector's address is one multiplication away from its index.
#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/launch.h"
#include "ops/activation/gate.cuh"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct VectorArgs {
  T* out;
  const T* x;
  int64_t out_stride, x_stride, width;  // of rows; of half a row of x
  Divider<uint32_t> vectors_per_row;
  uint32_t vectors;
};

template <class T, Gate kGate>
__global__ void __launch_bounds__(kThreads) activation_kernel(const __grid_constant__ VectorArgs<T> args) {
  constexpr int kVec = kVec16<T>;
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  uint32_t row, column;
  args.vectors_per_row(vector, &row, &column);
  const T* x = args.x + row * args.x_stride + column * kVec;
  if (starts_early() && vector < args.vectors) {
    prefetch_line(x);
    prefetch_line(x + args.width);
  }
  wait_for_predecessor();
  release_successor();
  if (vector >= args.vectors) return;
  const auto packed_a = load<kVec>(x), packed_b = load<kVec>(x + args.width);
  float a[kVec], b[kVec];
  to_floats(packed_a, a);
  to_floats(packed_b, b);
#pragma unroll
  for (int i = 0; i < kVec; ++i) a[i] = apply_gate<T, kGate>(a[i], b[i]);
  store(args.out + row * args.out_stride + column * kVec, from_floats<T>(a));
}

template <class T>
struct ElementArgs {
  T* out;
  const T* x;
  Rows out_rows, x_rows;
  int64_t width;
};

template <class T, Gate kGate>
__global__ void __launch_bounds__(kThreads) activation_element_kernel(const __grid_constant__ ElementArgs<T> args) {
  wait_for_predecessor();
  release_successor();
  const int64_t element = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t row = element / args.width, column = element % args.width;
  if (row >= args.out_rows.count) return;
  const T* x = args.x + args.x_rows.offset(row) + column;
  args.out[args.out_rows.offset(row) + column] =
      from_float<T>(apply_gate<T, kGate>(to_float(x[0]), to_float(x[args.width])));
}

template <class T, Gate kGate>
void choose(Stream stream, const ActivationArgs& a) {
  constexpr int kVec = kVec16<T>;
  const int64_t per_row = a.width / kVec, vectors = a.out_rows.count * per_row;
  if (vectors_fit<T, kVec>(a.out, a.out_rows) && vectors_fit<T, kVec>(a.x, a.x_rows) && a.width % kVec == 0 &&
      a.out_rows.uniform() && a.x_rows.uniform() && fits_32_bits(vectors + kThreads)) {
    const VectorArgs<T> args{a.out.ptr<T>(),
                             a.x.ptr<T>(),
                             a.out_rows.inner_stride,
                             a.x_rows.inner_stride,
                             a.width,
                             Divider<uint32_t>(per_row),
                             static_cast<uint32_t>(vectors)};
    launch<activation_kernel<T, kGate>>(stream, {ceil_div(vectors, kThreads), kThreads}, args);
  } else {
    const ElementArgs<T> args{a.out.ptr<T>(), a.x.ptr<T>(), a.out_rows, a.x_rows, a.width};
    launch<activation_element_kernel<T, kGate>>(stream, {ceil_div(a.out.numel(), kThreads), kThreads}, args);
  }
}

}  // namespace

void activation(Stream stream, const ActivationArgs& args) {
  dispatch<bf16, f16, float>(args.x.dtype, [&]<class T>() {
    dispatch_gate(args.gate, [&]<Gate kGate>() { choose<T, kGate>(stream, args); });
  });
}

}  // namespace kestrel::cuda
