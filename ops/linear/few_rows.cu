// Which products the kernel for few rows takes, and how: measured on an H200 with cold weights, in chains of dependent
// launches. What a block leaves free of its SM lets blocks of the next kernel fill their rings meanwhile: two blocks on
// an SM with rings of 64 KB beat rings of 80 (6144 x 2048: 5.9 and 6.2 us), and 96 KB beat 176 where x is streamed
// (16 x 2048 x 8192: 10.5 and 12.4).
#include "ops/linear/few_rows.h"

#include <algorithm>
#include <optional>

#include "kestrel/cuda.h"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/weight_stream.cuh"
#include "kestrel/launch.h"

namespace kestrel::cuda {
namespace {

constexpr int64_t kMostFewRows = 16;  // above, cuBLASLt is faster: 32 x 8192 x 2048 took 16.0 us here, 10.8 there
constexpr int64_t kLeastDepth = 64;
constexpr int64_t kMostDepth = 16384;         // deeper ones want blocks that share a tile
constexpr int64_t kSmallWeights = 9'000'000;  // bytes
constexpr uint32_t kSharedOfSm = 228 * 1024;  // of which each block takes 1 KB for the system
constexpr uint32_t kMostShared = 227 * 1024;
constexpr uint32_t kHalfShared = kSharedOfSm / 2 - 1024;
constexpr uint32_t kAloneOnSm = 140 * 1024;  // and room for the next kernel
constexpr uint32_t kThirdShared = kSharedOfSm / 3 - 1024;
constexpr uint32_t kRingOfThree = 72 * 1024;  // three blocks on an SM
constexpr uint32_t kRingOfTwo = 64 * 1024;
constexpr uint32_t kRingOfOne = 96 * 1024;
constexpr uint32_t kRingOfDeep = 144 * 1024;
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
  const uint32_t partial_bytes = 2 * plan.warps * rows * kPartialPitch * sizeof(float);
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
  return plan;
}

std::optional<FewRowsPlan> plan_of(const LinearArgs& a) {
  if (!layout_fits(a)) return {};
  const int64_t rows = a.out_rows.count, slabs = ceil_div(a.depth, kSlabColumns);
  const auto sms = static_cast<uint32_t>(sm_count());
  const int64_t tiles = ceil_div(a.columns, is_gate(a.activation) ? 8 : kTileRows);
  // One deep tile for each block: 16 rows are on their way sooner than a box (16 x 2048 x 2048: 3.9 and 4.4 us).
  const bool by_rows = slabs >= 32 && a.w.shape[0] * a.depth * 2 <= kSmallWeights;
  const WeightCopy copy = a.depth % kSlabColumns != 0 ? WeightCopy::kSlabs
                          : by_rows                   ? WeightCopy::kRows
                                                      : WeightCopy::kBox;
  if (rows <= 8) {
    if (slabs <= 9 && tiles > sms)  // 1 x 49152 x 576: 13.4 us, with two blocks on an SM 13.9
      if (auto plan = lay_out(a, {kLightKernel, 9, copy, 3 * sms, kRingOfThree, kThirdShared})) return plan;
    if (slabs > 36 && slabs <= 128 && tiles <= sms)  // 2048 x 8192: 8.50 us, x in shared memory 8.75
      if (auto plan = lay_out(a, {kDeepKernel, 16, copy, sms, kMostShared, kMostShared})) return plan;
    if (by_rows && slabs == 32)
      if (auto plan = lay_out(a, {kLightKernel, 16, copy, sms, kRingOfOne, kMostShared})) return plan;
  }
  for (int i = 0; i < kFewRowsKernelCount; ++i) {  // the first that fits
    const FewRowsKernel& kernel = kFewRowsKernels[i];
    if (i == kLightKernel || i == kDeepKernel || rows > 8 * kernel.groups ||
        (kernel.input == InputPlace::kRegisters && slabs > kernel.steps * kernel.warps))
      continue;
    const auto most_warps = static_cast<uint32_t>(kernel.warps);
    if (tiles > sms && kernel.blocks > 1) {
      const uint32_t pairs = 2 * sms / 64 * 64;  // 256 blocks for 132 SMs: 1 to 4% faster than 264
      // Of 8192 x 2048 (2 tiles for each) a half more: 7.65 us instead of 8.07.
      const bool more = rows <= 8 && tiles > pairs * 3 / 2 && tiles <= 2 * pairs;
      // Deeper rings do good where blocks live long: 51200 x 2048 takes 46.3 us, with 64 KB 46.9.
      const uint32_t ring = rows <= 8 && tiles >= 8 * pairs ? kRingOfOne : kRingOfTwo;
      if (auto plan = lay_out(a, {i, most_warps, copy, more ? pairs * 3 / 2 : pairs, ring, kHalfShared})) return plan;
    }
    const bool deep = kernel.input == InputPlace::kShared && slabs * kSlabBytes > kRingOfOne;
    if (auto plan = lay_out(a, {i, most_warps, copy, sms, deep ? kRingOfDeep : kRingOfOne, kMostShared})) return plan;
  }
  return {};
}

// A block for each tile, all of them at once on the SMs; a thread for each output.
std::optional<HeldWeightsPlan> plan_held(const LinearArgs& a) {
  const int64_t rows = a.out_rows.count, blocks = ceil_div(a.columns, is_gate(a.activation) ? 8 : kTileRows);
  const bool compiled = []<int... kDepths>(int64_t depth, std::integer_sequence<int, kDepths...>) {
    return ((depth == kDepths) || ...);
  }
  (a.depth, HeldDepths{});
  if (!compiled || !layout_fits(a) || blocks > 2 * sm_count()) return {};
  const int depth = static_cast<int>(a.depth), groups = rows <= 8 ? 1 : 2;
  uint32_t shared_bytes =
      held_warps(depth) * groups * 8 * kPartialPitch * sizeof(float) + kTileRows * held_pitch(depth) + 8;
  // Left alone, several of these blocks share an SM while others are free (16 x 960 x 576: 1.8 us, so 1.3).
  if (blocks * 2 <= sm_count()) shared_bytes = std::max(shared_bytes, kAloneOnSm);
  return HeldWeightsPlan{groups, blocks, shared_bytes};
}

}  // namespace

bool few_rows(Stream stream, const LinearArgs& args) {
  if (compute_capability() < 90) return false;
  if (const std::optional<HeldWeightsPlan> plan = plan_held(args)) {
    dispatch<bf16, f16>(args.x.dtype, [&]<class T>() { launch_held_weights<T>(stream, args, *plan); });
    return true;
  }
  const std::optional<FewRowsPlan> plan = plan_of(args);
  if (!plan) return false;
  dispatch<bf16, f16>(args.x.dtype, [&]<class T>() { launch_few_rows<T>(stream, args, *plan); });
  return true;
}

}  // namespace kestrel::cuda
