// Which products the kernel for few rows takes, and how: measured on an H200 with cold weights, in chains of dependent
// launches. 264 blocks, exactly two on an SM, for many tiles (8192 x 2048: 0.5-1 us better than 132 with twice the
// ring); a block on an SM with all of its shared memory for tiles that are deep (2048 x 8192: 8.2 us, 9.3-9.9 with 96
// KB).
#include "ops/linear/few_rows.h"

#include <algorithm>
#include <optional>

#include "kestrel/cuda.h"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/weight_stream.cuh"
#include "kestrel/launch.h"

namespace kestrel::cuda {
namespace {

constexpr int64_t kMostFewRows = 64;  // above, cuBLASLt is faster
constexpr int64_t kLeastDepth = 64;
constexpr int64_t kMostDepth = 16384;         // deeper ones want blocks that share a tile
constexpr int64_t kSmallWeights = 9'000'000;  // bytes: more warps, rows in place of boxes
constexpr uint32_t kSharedOfSm = 228 * 1024;  // of which each block takes 1 KB for the system
constexpr uint32_t kMostShared = 227 * 1024;
constexpr uint32_t kHalfShared = kSharedOfSm / 2 - 1024;
constexpr uint32_t kRingOfTwo = 80 * 1024;  // two blocks on an SM; or two kernels, the second one waiting
constexpr uint32_t kRingOfOne = 96 * 1024;
constexpr uint32_t kRingOfDeep = 176 * 1024;
constexpr uint32_t kLeastRing = 48 * 1024;    // in flight; less loses bandwidth
constexpr uint32_t kStagedBytes = 12 * 1024;  // bias and residual
constexpr uint32_t kMostStages = 16;

int64_t weight_stride(const LinearArgs& a) { return a.w.shape[0] == 1 ? a.depth : a.w.stride[0]; }

bool whole_vectors(const Tensor& t, const Rows& rows) {
  return rows.uniform() && (rows.count == 1 ? aligned_to(t.data, 16) : vectors_fit<bf16, 8>(t, rows));
}

bool layout_fits(const LinearArgs& a) {
  const int64_t stride = weight_stride(a);
  return a.x.dtype != DType::kF32 && a.out_rows.count <= kMostFewRows && a.depth >= kLeastDepth &&
         a.depth <= kMostDepth && a.depth % 8 == 0 && whole_vectors(a.x, a.x_rows) && aligned_to(a.w.data, 16) &&
         stride % 8 == 0 && stride >= a.depth && a.w.shape[0] < int64_t{1} << 30 &&
         a.w.shape[0] * stride < int64_t{1} << 38 && a.out_rows.uniform() && (!a.residual || a.residual_rows.uniform());
}

// Bias and residual are staged by 16 bytes.
uint32_t staged_tile_bytes(const LinearArgs& a) {
  const bool gate = is_gate(a.activation);
  if (a.columns % 8 != 0 || (a.b && !aligned_to(a.b->data, 16)) ||
      (a.residual && !whole_vectors(*a.residual, a.residual_rows)))
    return 0;
  return (a.b ? 32 : 0) + (a.residual ? a.out_rows.count * (gate ? 16 : 32) : 0);
}

// What is chosen for a call; the rest follows.
struct Choice {
  int kernel;
  uint32_t most_warps;  // at most the kernel's
  WeightCopy copy;
  uint32_t blocks;
  uint32_t ring;   // bytes at most
  uint32_t limit;  // of a block's shared memory
};

// None where no ring worth having is left beside x.
std::optional<FewRowsPlan> lay_out(const LinearArgs& a, const Choice& choice) {
  const FewRowsKernel& kernel = kFewRowsKernels[choice.kernel];
  const auto rows = static_cast<uint32_t>(a.out_rows.count);
  const auto slabs = static_cast<uint32_t>(ceil_div(a.depth, kSlabColumns));
  FewRowsPlan plan{};
  plan.kernel = choice.kernel;
  plan.copy = choice.copy;
  plan.steps = ceil_div(slabs, choice.most_warps);
  plan.warps = ceil_div(slabs, plan.steps);
  if (choice.most_warps == 9 && slabs % 8 == 0) {
    plan.steps = slabs / 8;
    plan.warps = 8;
  }
  if (plan.copy == WeightCopy::kRows && plan.steps * plan.warps != slabs) plan.copy = WeightCopy::kBox;
  plan.stage_bytes = plan.warps * kSlabBytes + (plan.copy == WeightCopy::kRows ? kTileRows * 16 : 0);
  plan.tiles = ceil_div(a.columns, is_gate(a.activation) ? 8 : kTileRows);
  plan.blocks = std::min(plan.tiles, choice.blocks);
  const uint32_t tiles = ceil_div(plan.tiles, plan.blocks), granules = tiles * plan.steps;

  plan.x_pitch = plan.steps * plan.warps * kSlabPitch + 16;
  const uint32_t x_bytes = kernel.input == InputPlace::kShared ? rows * plan.x_pitch : 0;
  const uint32_t kept_rows = std::min<uint32_t>(rows, kernel.groups == 1 ? 8 : 16);
  const uint32_t partial_bytes = 2 * plan.warps * kept_rows * kPartialPitch * sizeof(float);
  const uint32_t tile_bytes = staged_tile_bytes(a);
  plan.staged_tiles = tile_bytes == 0 ? 0 : std::min(tiles, kStagedBytes / tile_bytes);
  const uint32_t other = 1024 + kMostStages * 16 + x_bytes + partial_bytes + plan.staged_tiles * tile_bytes;
  if (other >= choice.limit) return {};
  plan.stages = std::min({std::min(choice.ring, choice.limit - other) / plan.stage_bytes, granules, kMostStages});
  const uint32_t ring = plan.stages * plan.stage_bytes;
  if (plan.stages < granules && ring < kLeastRing) return {};

  plan.barriers_at = ring;
  plan.x_at = plan.barriers_at + kMostStages * 16;
  plan.partial_at = plan.x_at + x_bytes;
  plan.bias_at = plan.partial_at + partial_bytes;
  plan.residual_at = plan.bias_at + (a.b ? plan.staged_tiles * 32 : 0);
  plan.shared_bytes = ring + other;
  // Of many blocks that go round not three on an SM, which would leave others with one: 51200 x 2048 takes 61 us so,
  // 47 with two on each.
  if (plan.tiles > plan.blocks && choice.limit == kHalfShared)
    plan.shared_bytes = std::max(plan.shared_bytes, kSharedOfSm / 3);
  return plan;
}

// By the first kernel of the list that fits.
std::optional<FewRowsPlan> plan_of(const LinearArgs& a) {
  if (!layout_fits(a)) return {};
  const int64_t rows = a.out_rows.count, slabs = ceil_div(a.depth, kSlabColumns);
  const bool small = a.w.shape[0] * a.depth * 2 <= kSmallWeights;
  const WeightCopy copy = a.depth % kSlabColumns != 0 ? WeightCopy::kSlabs
                          : small                     ? WeightCopy::kRows
                                                      : WeightCopy::kBox;
  const auto sms = static_cast<uint32_t>(sm_count());
  const int64_t tiles = ceil_div(a.columns, is_gate(a.activation) ? 8 : kTileRows);
  const uint32_t ring = slabs * kSlabBytes > kRingOfOne ? kRingOfDeep : kRingOfOne;
  for (int i = 0; i < kFewRowsKernelCount; ++i) {
    const FewRowsKernel& kernel = kFewRowsKernels[i];
    if (rows > 8 * kernel.groups || (kernel.small_only && !small) ||
        (kernel.input == InputPlace::kRegisters && slabs > kernel.steps * kernel.warps))
      continue;
    const auto most_warps = static_cast<uint32_t>(kernel.warps);
    if (tiles > sms && kernel.blocks > 1)
      if (auto plan = lay_out(a, {i, most_warps, copy, 2 * sms, kRingOfTwo, kHalfShared})) return plan;
    if (auto plan = lay_out(a, {i, most_warps, copy, sms, ring, kMostShared})) return plan;
  }
  return {};
}

}  // namespace

bool few_rows(Stream stream, const LinearArgs& args) {
  if (compute_capability() < 90) return false;
  const std::optional<FewRowsPlan> plan = plan_of(args);
  if (!plan) return false;
  dispatch<bf16, f16>(args.x.dtype, [&]<class T>() { launch_few_rows<T>(stream, args, *plan); });
  return true;
}

}  // namespace kestrel::cuda
