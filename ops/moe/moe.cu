// The plain kernel of both products, right for every legal shape. A block has eight rows (assignments of one expert)
// and a warp four sums for each: four columns, or two of both panels under a gate. Lanes share the depth, so weights
// and activations come in 16 bytes a lane (8 of e4m3), whole lines a warp; the sums of all lanes are joined by one
// exchange that leaves one value in each lane. Their order depends on depth and alignment alone. Bound by the
// conversions and FMAs of CUDA cores at many rows, at few by reading the weights.
#include <algorithm>

#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/warp.cuh"
#include "kestrel/launch.h"
#include "ops/activation/gate.cuh"
#include "ops/moe/parts.h"
#include "ops/moe/tile.h"
#include "ops/moe/warp.h"
#include "ops/moe/wgmma.h"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 8;
constexpr int kColumns = 4;
static_assert(kRows * kColumns == kWarp, "a lane ends with one sum");
constexpr int64_t kMostBlocksY = 65535;

template <class T>
struct Panel {
  const T* w;
  const float* scale;
  int64_t expert_stride, row_stride, scale_stride;
};

template <class T, class Out>
struct ProductArgs {
  Out* out;
  const T* x;
  const float* x_scale;
  Panel<T> first, second;
  const float* topk_weights;  // null: none are applied
  int64_t topk_weights_stride;
  Rows out_rows, x_rows;
  int64_t columns, width, depth;  // of out; of a panel
  const int32_t *sorted_token_ids, *expert_ids, *num_tokens_post_pad;
  int64_t positions, block_m, groups_per_block;  // groups of kRows
  int64_t assignments, experts;
  int slots, slots_per_row;
  int gate;  // -1: none
};

// sums[row * kColumns + column] += the products of this lane's part of the depth.
template <int kVec, int kCount, class T>
__device__ __forceinline__ void multiply(float (&sums)[kWarp], const T* const (&x)[kRows],
                                         const T* const (&w)[kColumns], int64_t depth) {
  for (int64_t k = threadIdx.x % kWarp * kVec; k + kVec <= depth; k += kWarp * kVec) {
    Vec<T, kVec> packed[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) packed[c] = load<kVec>(w[c] + k);
    float weights[kColumns][kVec];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) to_floats(packed[c], weights[c]);
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      float row[kVec];
      to_floats(load<kVec>(x[r] + k), row);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int i = 0; i < kVec; ++i) sums[r * kColumns + c] = fmaf(row[i], weights[c][i], sums[r * kColumns + c]);
    }
  }
}

// Lane l gets the sum of values[l] over all lanes.
template <int kHalf = kWarp / 2>
__device__ __forceinline__ float sum_and_share(float (&values)[kWarp]) {
  const bool upper = threadIdx.x & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float given = upper ? values[i] : values[i + kHalf];
    const float kept = upper ? values[i + kHalf] : values[i];
    values[i] = kept + shuffle_xor(given, kHalf);
  }
  if constexpr (kHalf > 1) return sum_and_share<kHalf / 2>(values);
  return values[0];
}

// kVec divides the depth.
template <class T, class Out, int kVec>
__global__ void __launch_bounds__(kThreads) moe_kernel(const __grid_constant__ ProductArgs<T, Out> args) {
  wait_for_predecessor();
  release_successor();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool has_gate = args.gate >= 0;
  const int64_t first = (blockIdx.x * int64_t{kWarps} + warp) * (has_gate ? kColumns / 2 : kColumns);
  if (first >= args.columns) return;
  const int64_t used = min(int64_t{*args.num_tokens_post_pad}, args.positions);

  // What sum number `c` of a row stands for. Columns past the last repeat it and are not stored.
  const auto column_of = [&](int c) { return first + (has_gate ? c % (kColumns / 2) : c); };
  const auto panel_row_of = [&](int c, bool* second) {
    const int64_t column = min(column_of(c), args.columns - 1);
    *second = has_gate ? c >= kColumns / 2 : column >= args.width;
    return *second && !has_gate ? column - args.width : column;
  };

  for (int64_t group = blockIdx.y;; group += gridDim.y) {
    const int64_t block = group / args.groups_per_block, block_start = block * args.block_m;
    if (block_start >= used) break;
    const int64_t start = block_start + group % args.groups_per_block * kRows;
    const int64_t end = min(block_start + args.block_m, used);
    const int64_t expert = args.expert_ids[block];
    if (expert < 0 || expert >= args.experts) continue;
    int32_t assignment = lane < kRows && start + lane < end ? args.sorted_token_ids[start + lane] : -1;
    const uint32_t valid = __ballot_sync(~0u, assignment >= 0 && assignment < args.assignments);
    if (valid == 0) continue;
    // Rows that are none stand for the first that is one: no access leaves x, and they are not stored.
    const int32_t any = __shfl_sync(~0u, assignment, __ffs(valid) - 1);
    if (!(valid >> lane & 1)) assignment = any;

    const T *x[kRows], *w[kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      x[r] = args.x + args.x_rows.offset(__shfl_sync(~0u, assignment, r) / args.slots_per_row);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      bool second;
      const int64_t row = panel_row_of(c, &second);
      const Panel<T>& panel = second ? args.second : args.first;
      w[c] = panel.w + expert * panel.expert_stride + row * panel.row_stride;
    }
    float sums[kWarp] = {};
    const int rows = kWarp - __clz(valid);
    if (rows == 1)
      multiply<kVec, 1>(sums, x, w, args.depth);
    else if (rows == 2)
      multiply<kVec, 2>(sums, x, w, args.depth);
    else if (rows <= 4)
      multiply<kVec, 4>(sums, x, w, args.depth);
    else
      multiply<kVec, kRows>(sums, x, w, args.depth);
    float value = sum_and_share(sums);

    const int r = lane / kColumns, c = lane % kColumns;
    const int32_t mine = __shfl_sync(~0u, assignment, r);
    if (args.x_scale) {
      bool second;
      const int64_t row = panel_row_of(c, &second);
      const Panel<T>& panel = second ? args.second : args.first;
      value = value * args.x_scale[mine / args.slots_per_row] * panel.scale[expert * panel.scale_stride + row];
    }
    if (has_gate) {
      const float g = shuffle_xor(value, kColumns / 2);
      value = apply_gate<Out>(static_cast<Gate>(args.gate), value, g);
    }
    if (args.topk_weights) value *= args.topk_weights[mine / args.slots * args.topk_weights_stride + mine % args.slots];
    if ((valid >> r & 1) && column_of(c) < args.columns && !(has_gate && c >= kColumns / 2))
      args.out[args.out_rows.offset(mine) + column_of(c)] = from_float<Out>(value);
  }
}

template <class T, class Out>
void multiply(Stream stream, const MoeArgs& a) {
  constexpr int kVec = sizeof(T) == 1 ? 8 : kVec16<T>;
  const int64_t groups_per_block = ceil_div(a.block_m, kRows);
  const int64_t groups = ceil_div(a.positions, a.block_m) * groups_per_block;
  if (groups == 0 || a.experts == 0) return;
  bool vectors = a.depth % kVec == 0 && aligned_to(a.x, kVec * sizeof(T)) && a.x_rows.inner_stride % kVec == 0 &&
                 a.x_rows.outer_stride % kVec == 0;
  Panel<T> panels[2]{};
  for (int i = 0; i < a.panels; ++i) {
    const ExpertWeights& w = a.panel[i];
    panels[i] = {static_cast<const T*>(w.data), w.scale, w.expert_stride, w.row_stride, w.scale_stride};
    vectors =
        vectors && aligned_to(w.data, kVec * sizeof(T)) && w.expert_stride % kVec == 0 && w.row_stride % kVec == 0;
  }
  const int64_t out_columns = a.panels == 2 && !a.gate ? 2 * a.width : a.width;
  const ProductArgs<T, Out> args{a.out.ptr<Out>(),
                                 static_cast<const T*>(a.x),
                                 a.x_scale,
                                 panels[0],
                                 panels[1],
                                 a.topk_weights,
                                 a.topk_weights_stride,
                                 a.out_rows,
                                 a.x_rows,
                                 out_columns,
                                 a.width,
                                 a.depth,
                                 a.sorted_token_ids,
                                 a.expert_ids,
                                 a.num_tokens_post_pad,
                                 a.positions,
                                 a.block_m,
                                 groups_per_block,
                                 a.assignments(),
                                 a.experts,
                                 static_cast<int>(a.slots),
                                 static_cast<int>(a.slots_per_row),
                                 a.gate ? static_cast<int>(*a.gate) : -1};
  const LaunchShape shape{ceil_div(out_columns, kWarps * (a.gate ? kColumns / 2 : kColumns)), kThreads,
                          static_cast<int>(std::min(groups, kMostBlocksY))};
  vectors ? launch<moe_kernel<T, Out, kVec>>(stream, shape, args) : launch<moe_kernel<T, Out, 1>>(stream, shape, args);
}

template <class T, class Out>
void run(Stream stream, const MoeArgs& a) {
  if (!a.reduce) return multiply<T, Out>(stream, a);
  sum_of_parts(stream, a, DType::kF32, columns_of_parts(a, DType::kF32),
               [&](const MoeArgs& product) { multiply<T, float>(stream, product); });
}

}  // namespace

void moe(Stream stream, const MoeArgs& args) {
  if (moe_warp(stream, args)) return moe_note_kernel("warp");
  if (moe_wgmma(stream, args)) return moe_note_kernel("wgmma");
  moe_note_kernel("plain");
  dispatch<bf16, f16, e4m3>(args.dtype, [&]<class T>() {
    if constexpr (dtype_of<T> == DType::kE4M3) {
      if (args.out.dtype == DType::kF32)  // for fused_moe
        multiply<T, float>(stream, args);
      else
        run<T, bf16>(stream, args);
    } else {
      run<T, T>(stream, args);
    }
  });
}

}  // namespace kestrel::cuda
