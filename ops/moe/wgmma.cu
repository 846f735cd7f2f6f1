// Which operands the wgmma kernels take, and by which tile; and sums over experts: parts in fp32 [T*K, columns] in the
// workspace, a chunk of columns at a time, then their sum in order. A part that no assignment writes keeps the mark
// that its first column got before, a NaN that no arithmetic makes.
#include <algorithm>

#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/launch.h"
#include "ops/moe/compiled_wgmma.h"
#include "ops/moe/wgmma.h"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kMark = 0xffc0dead;

struct MarkArgs {
  uint32_t* parts;
  int64_t count, columns;
};

__global__ void __launch_bounds__(kThreads) mark_kernel(const __grid_constant__ MarkArgs args) {
  wait_for_predecessor();
  release_successor();
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < args.count) args.parts[i * args.columns] = kMark;
}

template <class Out>
struct SumArgs {
  Out* out;
  const float* parts;  // [tokens * slots, columns]
  Rows out_rows;
  int64_t columns, slots;
};

// A thread has four columns of a token.
template <class Out>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(const __grid_constant__ SumArgs<Out> args) {
  constexpr int kSize = 4, kAhead = 8;
  wait_for_predecessor();
  release_successor();
  const int64_t vectors = args.columns / kSize, vector = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t token = vector / vectors, column = vector % vectors * kSize;
  if (token >= args.out_rows.count) return;
  const float* const first = args.parts + token * args.slots * args.columns;
  float sum[kSize] = {};
  for (int64_t base = 0; base < args.slots; base += kAhead) {
    Vec<float, kSize> part[kAhead];
    uint32_t mark[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const float* const row = first + (base + k < args.slots ? base + k : base) * args.columns;
      part[k] = load<kSize>(row + column);
      mark[k] = __float_as_uint(*row);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (base + k < args.slots && mark[k] != kMark)
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum[i] += __uint_as_float(part[k].words[i]);
  }
  store(args.out + args.out_rows.offset(token) + column, from_floats<Out>(sum));
}

bool whole_chunks(int64_t elements, DType dtype) { return elements * size_of(dtype) % 16 == 0; }

bool rows_fit(const void* data, const Rows& rows, DType dtype) {
  const int64_t levels = rows.count > rows.inner ? (rows.count - 1) / rows.inner : 0;
  const int64_t last = levels * rows.outer_stride + std::min(rows.count, rows.inner) * rows.inner_stride;
  return aligned_to(data, 16) && whole_chunks(rows.inner_stride, dtype) && whole_chunks(rows.outer_stride, dtype) &&
         rows.inner_stride >= 0 && rows.outer_stride >= 0 && last * size_of(dtype) / 16 < (int64_t{1} << 32) - 1;
}

bool fits(const MoeArgs& a, DType out) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (compute_capability() != 90 || a.positions == 0 || a.experts == 0 || a.depth == 0) return false;
  if (a.positions >= kMost || a.assignments() >= kMost || a.block_m >= kMost || a.depth >= kMost || a.width >= kMost)
    return false;
  if ((a.positions / 32 + a.positions / a.block_m + 1) * (ceil_div(a.width, 64) * a.panels) >= kMost) return false;
  if (!whole_chunks(a.depth, a.dtype) || a.width % 8 != 0 || !rows_fit(a.x, a.x_rows, a.dtype)) return false;
  for (int i = 0; i < a.panels; ++i) {
    const ExpertWeights& w = a.panel[i];
    if (!aligned_to(w.data, 16) || !whole_chunks(w.row_stride, a.dtype) || !whole_chunks(w.expert_stride, a.dtype) ||
        w.row_stride < a.depth || w.expert_stride < (a.experts > 1 ? a.depth : 0) ||
        w.expert_stride >= int64_t{1} << 38)
      return false;
  }
  return a.reduce || rows_fit(a.out.data, a.out_rows, out);
}

// The lowest and the highest tile of a type.
constexpr int edge_tile(DType dtype, bool highest) {
  int best = -1;
  for (int i = 0; i < kMoeTileCount; ++i) {
    const MoeTile& t = kMoeTiles[i];
    if (t.kernel != MoeKernel::kWgmma || !t.takes(dtype)) continue;
    if (best < 0 || (t.block_m > kMoeTiles[best].block_m) == highest) best = i;
  }
  return best;
}

// In the tile that was chosen. Where that is none of these: up to 16 rows of an expert the lowest wastes least, and its
// two blocks on an SM overlap with the next kernel's.
void product(Stream stream, const MoeArgs& a) {
  int tile = a.tile;
  if (tile < 0 || moe_tile(tile).kernel != MoeKernel::kWgmma)
    tile = edge_tile(a.dtype, a.assignments() > 16 * a.experts);
  if (tile >= kMoeTileCount) return moe_added_launch(tile)(stream, a);
  kMoeWgmma[tile][a.dtype == DType::kBF16 ? 0 : a.dtype == DType::kF16 ? 1 : 2](stream, a);
}

template <class Out>
void reduce(Stream stream, const MoeArgs& a, int64_t most_columns) {
  const int64_t assignments = a.assignments();
  const auto parts = a.workspace->ptr<float>();
  for (int64_t first = 0; first < a.width; first += most_columns) {
    const int64_t columns = std::min(most_columns, a.width - first);
    const MarkArgs mark{a.workspace->ptr<uint32_t>(), assignments, columns};
    launch<mark_kernel>(stream, {ceil_div(assignments, kThreads), kThreads}, mark);
    MoeArgs chunk = a;
    chunk.out = Tensor(parts, DType::kF32, {assignments, columns}, a.out.device);
    chunk.out_rows = {assignments, assignments, columns, 0};
    chunk.panel[0] = from_row(a.panel[0], first, a.dtype);
    chunk.width = columns;
    product(stream, chunk);
    const SumArgs<Out> sum{a.out.ptr<Out>() + first, parts, a.out_rows, columns, a.slots};
    launch<sum_parts_kernel<Out>>(stream, {ceil_div(a.tokens * (columns / 4), kThreads), kThreads}, sum);
  }
}

}  // namespace

bool moe_wgmma(Stream stream, const MoeArgs& a) {
  const DType out = a.dtype == DType::kE4M3 ? a.out.dtype : a.dtype;
  if (!fits(a, out)) return false;
  if (!a.reduce) {
    product(stream, a);
    return true;
  }
  constexpr int64_t kLeast = 256;  // columns: less would be mostly other launches
  const int64_t fit = a.workspace->shape[0] / (4 * a.assignments()) / kLeast * kLeast;
  const int64_t columns = a.workspace->shape[0] / (4 * a.assignments()) >= a.width ? a.width : fit;
  const bool aligned =
      aligned_to(a.out.data, 8) && a.out_rows.inner_stride % 4 == 0 && a.out_rows.outer_stride % 4 == 0;
  if (columns == 0 || !aligned) return false;
  out == DType::kF16 ? reduce<f16>(stream, a, columns) : reduce<bf16>(stream, a, columns);
  return true;
}

}  // namespace kestrel::cuda
