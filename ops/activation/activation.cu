// A thread takes kUnroll vectors of 16 bytes of each half, far apart, all loaded before the first is used; the grid is
// flat over the vectors of all rows. Bound by memory: 3 elements moved for each one written.
#include <algorithm>

#include "kestrel/hopper/numeric.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/launch.h"
#include "ops/activation/gate.cuh"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct KernelArgs {
  T* out;
  const T* x;
  Rows out_rows, x_rows;
  int64_t width;  // elements in a half row
  int64_t vectors_per_row;
  int64_t vectors;
};

template <class T, Gate kGate, int kVec, int kUnroll>
__global__ void __launch_bounds__(kThreads) activation_kernel(KernelArgs<T> args) {
  using V = Vec<T, kVec>;
  wait_for_predecessor();
  release_successor();
  const int64_t base = blockIdx.x * int64_t{kThreads} * kUnroll + threadIdx.x;
  V a[kUnroll], b[kUnroll];
  T* out[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t v = base + u * kThreads;
    out[u] = nullptr;
    if (v >= args.vectors) continue;
    const int64_t row = v / args.vectors_per_row;
    const int64_t column = (v - row * args.vectors_per_row) * kVec;
    const T* x = args.x + args.x_rows.offset(row) + column;
    out[u] = args.out + args.out_rows.offset(row) + column;
    a[u] = load<V>(x);
    b[u] = load<V>(x + args.width);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (!out[u]) continue;
    V result;
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      result.at[i] = from_float<T>(apply_gate<kGate>(to_float(a[u].at[i]), to_float(b[u].at[i])));
    store(out[u], result);
  }
}

template <class T, Gate kGate, int kVec, int kUnroll>
void run(Stream stream, const ActivationArgs& a) {
  const int64_t per_row = a.width / kVec;
  const KernelArgs<T> args{
      a.out.ptr<T>(), a.x.ptr<T>(), a.out_rows, a.x_rows, a.width, per_row, a.out_rows.count * per_row};
  launch(stream, {ceil_div(args.vectors, kThreads * kUnroll), kThreads}, activation_kernel<T, kGate, kVec, kUnroll>,
         args);
}

}  // namespace

void activation(Stream stream, const ActivationArgs& args) {
  dispatch<bf16, f16, float>(args.x.dtype, [&]<class T>() {
    dispatch_gate(args.gate, [&]<Gate kGate>() { run<T, kGate, kVec16<T>, 1>(stream, args); });
  });
}

}  // namespace kestrel::cuda
