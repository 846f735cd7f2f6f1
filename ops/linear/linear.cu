// Four ways, tried in this order.
//   1. At few rows a kernel of ours that streams the weights (few_rows.h).
//   2. cuBLASLt alone, with bias and residual in its epilogue.
//   3. A product in fp32 into the workspace, chunk by chunk of the rows so that it is still in L2 when a kernel of ours
//      reads it back, which adds bias, activation and residual and rounds once.
//   4. A plain kernel, a thread for each element, for depths that make no matrix product (0 too), rows of two strides
//      and rows that overlap, and whatever cuBLASLt has no algorithm for.
// Which way a call goes depends on shapes, strides and alignment alone.
#include <algorithm>

#include "kestrel/cuda.h"
#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/launch.h"
#include "ops/linear/activate.cuh"
#include "ops/linear/few_rows.h"
#include "ops/linear/linear_args.h"
#include "ops/linear/product.h"

namespace kestrel::cuda {
namespace {

using Kind = LinearActivation;

constexpr int kThreads = 256;
constexpr int64_t kLeastDepth = 16;  // of a product worth a tensor core's instruction
constexpr int64_t kAlignment = 16;
constexpr int64_t kLeastBiasRows = 64;
constexpr int64_t kSumsOffset = 8 << 20;  // in the workspace; cuBLASLt has what lies before it
constexpr int64_t kSumsBytes = kLinearWorkspaceBytes - kSumsOffset;
constexpr int64_t kRowTile = 128;

// A thread finishes one vector of 16 bytes of out. The sums of a chunk are few enough for 32-bit indices.
template <class T>
struct FinishArgs {
  T* out;
  const float* sums;
  const T* bias;
  const T* residual;
  int64_t out_stride, residual_stride;
  uint32_t columns;  // of out; the sums of a gate have twice as many
  Divider<uint32_t> vectors_per_row;
  uint32_t vectors;
};

template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ FinishArgs<T> args) {
  constexpr int kVec = kVec16<T>;
  constexpr uint32_t kHalves = is_gate(kKind) ? 2 : 1;
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  uint32_t row, column;
  args.vectors_per_row(vector, &row, &column);
  column *= kVec;
  const float* sums = args.sums + row * kHalves * args.columns + column;
  compute_now(sums);
  wait_for_predecessor();
  release_successor();
  if (vector >= args.vectors) return;

  const T* const bias = args.bias + column;
  Vec<float, kVec> packed_sums[kHalves];
  Vec<T, kVec> packed_bias[kHalves], packed_residual;
#pragma unroll
  for (uint32_t half = 0; half < kHalves; ++half) {
    packed_sums[half] = load<kVec>(sums + half * args.columns);
    if (args.bias) packed_bias[half] = load<kVec>(bias + half * args.columns);
  }
  if (args.residual) packed_residual = load<kVec>(args.residual + row * args.residual_stride + column);

  float values[kHalves][kVec];
#pragma unroll
  for (uint32_t half = 0; half < kHalves; ++half) {
    to_floats(packed_sums[half], values[half]);
    if (!args.bias) continue;
    float added[kVec];
    to_floats(packed_bias[half], added);
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[half][i] += added[i];
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) values[0][i] = activate<T, kKind>(values[0][i], values[kHalves - 1][i]);
  if (args.residual) {
    float added[kVec];
    to_floats(packed_residual, added);
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[0][i] += added[i];
  }
  store(args.out + row * args.out_stride + column, from_floats<T>(values[0]));
}

// Rows of `out` from first_row on, an element for each thread: from sums, or from x and w where sums is null.
template <class T>
struct ElementArgs {
  T* out;
  const float* sums;
  const T *x, *w, *bias, *residual;
  Rows out_rows, x_rows, residual_rows;
  int64_t first_row, rows, columns, depth, w_stride;
  Kind kind;
};

template <class T>
__device__ __forceinline__ float dot(const T* x, const T* w, int64_t depth) {
  float sum = 0;
#pragma unroll 4
  for (int64_t i = 0; i < depth; ++i) sum = fmaf(to_float(x[i]), to_float(w[i]), sum);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) element_kernel(const __grid_constant__ ElementArgs<T> args) {
  wait_for_predecessor();
  release_successor();
  const int64_t element = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t row = element / args.columns, column = element % args.columns;
  if (row >= args.rows) return;
  const int halves = is_gate(args.kind) ? 2 : 1;
  float values[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == halves) break;
    const int64_t output = half * args.columns + column;
    values[half] =
        args.sums ? args.sums[row * halves * args.columns + output]
                  : dot(args.x + args.x_rows.offset(args.first_row + row), args.w + output * args.w_stride, args.depth);
    if (args.bias) values[half] += to_float(args.bias[output]);
  }
  float value = 0;
  dispatch_kind(args.kind, [&]<Kind kKind>() { value = activate<T, kKind>(values[0], values[1]); });
  if (args.residual) value += to_float(args.residual[args.residual_rows.offset(args.first_row + row) + column]);
  args.out[args.out_rows.offset(args.first_row + row) + column] = from_float<T>(value);
}

template <class T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->ptr<T>() : nullptr;
}

template <class T>
void run_elements(Stream stream, const LinearArgs& a, const float* sums, int64_t first_row, int64_t rows) {
  const ElementArgs<T> args{a.out.ptr<T>(),
                            sums,
                            a.x.ptr<T>(),
                            a.w.ptr<T>(),
                            pointer<T>(a.b),
                            pointer<T>(a.residual),
                            a.out_rows,
                            a.x_rows,
                            a.residual_rows,
                            first_row,
                            rows,
                            a.columns,
                            a.depth,
                            a.w.stride[0],
                            a.activation};
  launch<element_kernel<T>>(stream, {ceil_div(rows * a.columns, kThreads), kThreads}, args);
}

template <class T>
void finish(Stream stream, const LinearArgs& a, const float* sums, int64_t first_row, int64_t rows) {
  constexpr int kVec = kVec16<T>;
  const bool fast = a.columns % kVec == 0 && a.out_rows.uniform() && vectors_fit<T, kVec>(a.out, a.out_rows) &&
                    (!a.b || aligned_to(a.b->data, 16)) &&
                    (!a.residual || (a.residual_rows.uniform() && vectors_fit<T, kVec>(*a.residual, a.residual_rows)));
  if (!fast) return run_elements<T>(stream, a, sums, first_row, rows);
  const int64_t vectors = rows * a.columns / kVec;
  const T* const residual = pointer<T>(a.residual);
  const FinishArgs<T> args{a.out.ptr<T>() + first_row * a.out_rows.inner_stride,
                           sums,
                           pointer<T>(a.b),
                           residual ? residual + first_row * a.residual_rows.inner_stride : nullptr,
                           a.out_rows.inner_stride,
                           a.residual_rows.inner_stride,
                           static_cast<uint32_t>(a.columns),
                           Divider<uint32_t>(a.columns / kVec),
                           static_cast<uint32_t>(vectors)};
  dispatch_kind(a.activation, [&]<Kind kKind>() {
    launch<finish_kernel<T, kKind>>(stream, {ceil_div(vectors, kThreads), kThreads}, args);
  });
}

// The distance of rows, as cuBLASLt takes them: of one stride that is no less than their width. Otherwise 0.
int64_t row_stride(const Rows& rows, int64_t width) {
  if (rows.count == 1) return width;
  return rows.uniform() && rows.inner_stride >= width ? rows.inner_stride : 0;
}

// Bias and residual in cuBLASLt's epilogue, and the GELU of a hidden layer in bf16. With a bias only where its kernels
// for Hopper are what it names: for few rows, or rows that are no whole number of 16 bytes, those for older GPUs are,
// which round the sum to 16 bits before they add the bias (37 x 260 x 1200: errors of 1.4 units in the last place).
bool multiply_to_out(Stream stream, const LinearArgs& a, Product product, Memory workspace) {
  product.gelu = a.hidden && a.activation == Kind::kGeluTanh && a.out.dtype == DType::kBF16;
  if ((a.activation != Kind::kNone && !product.gelu) || a.columns == 1) return false;
  product.out = a.out.data;
  product.out_dtype = a.out.dtype;
  product.out_stride = row_stride(a.out_rows, a.columns);
  if (product.out_stride == 0) return false;
  if (a.residual) {
    product.residual = a.residual->data;
    product.residual_stride = row_stride(a.residual_rows, a.columns);
    if (product.residual_stride == 0) return false;
  }
  if (a.b) {
    if (product.rows < kLeastBiasRows) return false;
    const void* operands[] = {a.b->data, product.x, product.w, product.out, product.residual};
    const int64_t rows[] = {
        a.columns, a.depth, product.x_stride, product.w_stride, product.out_stride, product.residual_stride};
    for (const void* operand : operands)
      if (!aligned_to(operand, kAlignment)) return false;
    for (const int64_t row : rows)
      if (row * size_of(a.x.dtype) % kAlignment != 0) return false;
    product.bias = a.b->data;
  }
  return multiply(stream, product, workspace);
}

// The number of rows that were finished.
int64_t multiply_to_sums(Stream stream, const LinearArgs& a, Product product, Memory workspace) {
  if (workspace.bytes == 0) return 0;
  const auto sums = reinterpret_cast<float*>(static_cast<char*>(workspace.data) + kSumsOffset);
  int64_t chunk = kSumsBytes / (static_cast<int64_t>(sizeof(float)) * product.columns);
  if (chunk > kRowTile) chunk -= chunk % kRowTile;
  if (chunk == 0) return 0;
  const int64_t rows = product.rows;
  for (int64_t row = 0; row < rows; row += chunk) {
    product.rows = std::min(chunk, rows - row);
    product.x = static_cast<const char*>(a.x.data) + row * product.x_stride * size_of(a.x.dtype);
    product.out = sums;
    product.out_dtype = DType::kF32;
    product.out_stride = product.columns;
    if (!multiply(stream, product, {workspace.data, kSumsOffset})) return row;
    dispatch<bf16, f16, float>(a.x.dtype, [&]<class T>() { finish<T>(stream, a, sums, row, product.rows); });
  }
  return rows;
}

}  // namespace

void linear(Stream stream, const LinearArgs& a, const std::optional<Tensor>& workspace) {
  if (few_rows(stream, a)) return;
  const int64_t rows = a.out_rows.count, outputs = a.w.shape[0];
  const Memory memory = workspace ? Memory{workspace->data, kLinearWorkspaceBytes} : Memory{};
  int64_t done = 0;
  const int64_t x_stride = row_stride(a.x_rows, a.depth);
  const int64_t w_stride = outputs == 1 ? a.depth : a.w.stride[0];
  if (a.depth >= kLeastDepth && x_stride != 0 && w_stride >= a.depth) {
    const Product product{a.x.device, a.x.dtype, a.x.dtype, rows,     outputs, a.depth,
                          a.x.data,   a.w.data,  x_stride,  w_stride, nullptr, 0};
    if (multiply_to_out(stream, a, product, memory)) return;
    done = multiply_to_sums(stream, a, product, memory);
  }
  if (done < rows)
    dispatch<bf16, f16, float>(a.x.dtype, [&]<class T>() { run_elements<T>(stream, a, nullptr, done, rows - done); });
}

}  // namespace kestrel::cuda
