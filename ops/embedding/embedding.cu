// A thread copies one vector of 16 bytes of the output; the grid is flat over the vectors of all rows. Layouts that do
// not fit go in the widest units that divide every address and stride, down to bytes, so the dtype never matters.
// Bound by memory, an element read and one written; small calls by the latency of an id and the row it points to.
#include <cstdint>

#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/launch.h"
#include "ops/embedding/args.h"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 256;

// Strides of out and table are in bytes.
template <class Id>
struct VectorArgs {
  char* out;
  const char* table;
  const Id* ids;
  int64_t out_stride, table_stride, id_stride, entries;
  Divider<uint32_t> vectors_per_row;
  uint32_t vectors;
};

template <class Id>
__global__ void __launch_bounds__(kThreads) embedding_kernel(const __grid_constant__ VectorArgs<Id> args) {
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  uint32_t row, column;
  args.vectors_per_row(vector, &row, &column);
  wait_for_predecessor();
  release_successor();
  if (vector >= args.vectors) return;
  const int64_t id = args.ids[row * args.id_stride];
  Vec<char, 16> value{};
  if (static_cast<uint64_t>(id) < static_cast<uint64_t>(args.entries))
    value = load<16>(args.table + id * args.table_stride + column * 16);
  store(args.out + row * args.out_stride + column * 16, value);
}

template <class Id>
struct UnitArgs {
  char* out;
  const char* table;
  const Id* ids;
  Rows out_rows, id_rows;
  int64_t element, table_stride, entries;  // bytes of an element, bytes from entry to entry
  int64_t units_per_row;
};

template <int kUnit, class Id>
__global__ void __launch_bounds__(kThreads) embedding_unit_kernel(const __grid_constant__ UnitArgs<Id> args) {
  wait_for_predecessor();
  release_successor();
  const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t row = index / args.units_per_row, column = index % args.units_per_row;
  if (row >= args.out_rows.count) return;
  const int64_t id = args.ids[args.id_rows.offset(row)];
  Vec<char, kUnit> value{};
  if (static_cast<uint64_t>(id) < static_cast<uint64_t>(args.entries))
    value = load<kUnit>(args.table + id * args.table_stride + column * kUnit);
  store(args.out + args.out_rows.offset(row) * args.element + column * kUnit, value);
}

template <int kUnit, class Id>
void run_units(Stream stream, const EmbeddingArgs& a) {
  const int64_t element = size_of(a.table.dtype), per_row = a.row_bytes / kUnit;
  const UnitArgs<Id> args{a.out.ptr<char>(), a.table.ptr<char>(),         a.ids.ptr<Id>(),  a.out_rows, a.id_rows,
                          element,           a.table.stride[0] * element, a.table.shape[0], per_row};
  launch<embedding_unit_kernel<kUnit, Id>>(stream, {ceil_div(a.out_rows.count * per_row, kThreads), kThreads}, args);
}

// Do addresses and sizes all divide by `bytes`?
bool divides(const EmbeddingArgs& a, int64_t bytes) {
  const int64_t element = size_of(a.table.dtype);
  return aligned_to(a.out.data, bytes) && aligned_to(a.table.data, bytes) && a.row_bytes % bytes == 0 &&
         a.table.stride[0] * element % bytes == 0 && a.out_rows.inner_stride * element % bytes == 0 &&
         a.out_rows.outer_stride * element % bytes == 0;
}

template <class Id>
void choose(Stream stream, const EmbeddingArgs& a) {
  const int64_t element = size_of(a.table.dtype), per_row = a.row_bytes / 16, vectors = a.out_rows.count * per_row;
  if (!divides(a, 2)) return run_units<1, Id>(stream, a);
  if (!divides(a, 4)) return run_units<2, Id>(stream, a);
  if (!divides(a, 8)) return run_units<4, Id>(stream, a);
  if (!divides(a, 16)) return run_units<8, Id>(stream, a);
  if (!a.out_rows.uniform() || !a.id_rows.uniform() || !fits_32_bits(vectors + kThreads))
    return run_units<16, Id>(stream, a);
  const VectorArgs<Id> args{a.out.ptr<char>(),
                            a.table.ptr<char>(),
                            a.ids.ptr<Id>(),
                            a.out_rows.inner_stride * element,
                            a.table.stride[0] * element,
                            a.id_rows.inner_stride,
                            a.table.shape[0],
                            Divider<uint32_t>(per_row),
                            static_cast<uint32_t>(vectors)};
  launch<embedding_kernel<Id>>(stream, {ceil_div(vectors, kThreads), kThreads}, args);
}

}  // namespace

void embedding(Stream stream, const EmbeddingArgs& args) {
  dispatch<int32_t, int64_t>(args.ids.dtype, [&]<class Id>() { choose<Id>(stream, args); });
}

}  // namespace kestrel::cuda
