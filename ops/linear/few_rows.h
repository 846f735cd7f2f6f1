// The product of a linear layer at few rows, at the speed of its weights.
#pragma once

#include <cstdint>
#include <utility>

#include "ops/linear/linear_args.h"

namespace kestrel::cuda {

// False where another way is faster, or the only one: nothing is launched then.
bool few_rows(Stream stream, const LinearArgs& args);

// What both kernels work on.
template <class T>
struct FewRowsOperands {
  T* out;
  const T *x, *w, *bias, *residual;
  int64_t out_stride, x_stride, w_stride, residual_stride;
  uint32_t rows, columns, depth;  // columns of out
  LinearActivation kind;

  explicit FewRowsOperands(const LinearArgs& a)
      : out(a.out.ptr<T>()),
        x(a.x.ptr<T>()),
        w(a.w.ptr<T>()),
        bias(a.b ? a.b->ptr<T>() : nullptr),
        residual(a.residual ? a.residual->ptr<T>() : nullptr),
        out_stride(a.out_rows.inner_stride),
        x_stride(a.x_rows.inner_stride),
        w_stride(a.w.stride[0]),
        residual_stride(a.residual_rows.inner_stride),
        rows(static_cast<uint32_t>(a.out_rows.count)),
        columns(static_cast<uint32_t>(a.columns)),
        depth(static_cast<uint32_t>(a.depth)),
        kind(a.activation) {}
};

// The kernels compiled, for each dtype: how many groups of 8 rows of x, where x is kept, and the consumer warps.
enum class InputPlace {
  kRegisters,  // for `steps` granules of a tile's depth or fewer
  kStreamed,   // in registers too, fetched anew for each tile, `steps` granules ahead
  kShared,     // all of it in shared memory
};
struct FewRowsKernel {
  int groups;
  InputPlace input;
  int steps;
  int warps;   // at most
  int blocks;  // on an SM at least, by their registers
};
inline constexpr FewRowsKernel kFewRowsKernels[] = {
    {1, InputPlace::kRegisters, 2, 16, 2}, {1, InputPlace::kRegisters, 4, 9, 2}, {1, InputPlace::kShared, 1, 9, 2},
    {2, InputPlace::kRegisters, 2, 12, 2}, {2, InputPlace::kRegisters, 4, 8, 2}, {2, InputPlace::kStreamed, 4, 8, 1},
    {1, InputPlace::kRegisters, 8, 16, 1},
};
inline constexpr int kLightKernel = 0;  // of few registers, up to 16 warps
inline constexpr int kDeepKernel = 6;
inline constexpr int kFewRowsKernelCount = sizeof(kFewRowsKernels) / sizeof(FewRowsKernel);

// How a granule of weights is fetched.
enum class WeightCopy : uint32_t {
  kBox,    // as one box
  kSlabs,  // as a box for each slab: a depth that is no multiple of 64 ends in zeros
  kRows,   // as 16 rows: without a tensor map, quicker to begin
};

// One call of a kernel. Offsets in shared memory count from its first multiple of 1024.
struct FewRowsPlan {
  int kernel;
  WeightCopy copy;
  uint32_t warps, steps;  // granules of `warps` slabs in the depth
  uint32_t tiles, blocks;
  uint32_t stages, stage_bytes;
  uint32_t staged_tiles;  // of each block: those whose bias and residual are brought to shared memory at the start
  uint32_t barriers_at, x_at, x_pitch, partial_at, bias_at, residual_at, shared_bytes;
};

// Of few weights: held_weights.cuh, compiled for each of these depths. A warp holds one or two slabs.
using HeldDepths = std::integer_sequence<int, 512, 576, 768, 1024, 1152, 1536>;
constexpr int held_steps(int depth) { return depth <= 768 ? 1 : 2; }
constexpr int held_warps(int depth) { return depth / 64 / held_steps(depth); }
// Of a row of weights in shared memory: neighbours' 64 bytes are in other banks.
constexpr uint32_t held_pitch(uint32_t depth) { return depth * 2 + 64; }
struct HeldWeightsPlan {
  int groups;  // of 8 rows
  int64_t blocks;
  uint32_t shared_bytes;
};

template <class T>
void launch_held_weights(Stream stream, const LinearArgs& args, const HeldWeightsPlan& plan);
template <class T>
void launch_few_rows(Stream stream, const LinearArgs& args, const FewRowsPlan& plan);

}  // namespace kestrel::cuda
