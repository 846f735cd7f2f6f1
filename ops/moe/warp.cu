// Which products of experts the warp kernels take, and how.
#include <algorithm>
#include <cstdlib>

#include "kestrel/cuda.h"
#include "kestrel/hopper/vec.cuh"
#include "ops/moe/tile.h"
#include "ops/moe/warp.cuh"

namespace kestrel::cuda {
namespace {

constexpr int64_t kMostTokens = 64;
constexpr int64_t kMostOneGroup = 3;          // assignments of an expert, on average: seldom more than 8 then
constexpr uint32_t kSharedOfSm = 228 * 1024;  // of which each block takes 1 KB for the system
constexpr uint32_t kRingOfTwo = 64 * 1024;    // two blocks on an SM
constexpr uint32_t kRingOfOne = 144 * 1024;
constexpr uint32_t kRingOfSum = 64 * 1024;  // so that two kernels' blocks share an SM
constexpr uint32_t kMostStages = 16;
constexpr int64_t kMostStride = int64_t{1} << 37;  // elements: a tensor map holds 2^40 bytes

bool weights_fit(const MoeArgs& a, const ExpertWeights& w) {
  const int64_t part = 16 / size_of(a.dtype);
  return aligned_to(w.data, 16) &&
         (a.width == 1 || (w.row_stride % part == 0 && w.row_stride >= a.depth && w.row_stride < kMostStride)) &&
         (a.experts == 1 || (w.expert_stride % part == 0 && w.expert_stride > 0 && w.expert_stride < kMostStride)) &&
         (!w.scale ||
          (aligned_to(w.scale, 16) && (a.experts == 1 || (w.scale_stride % 4 == 0 && w.scale_stride >= 0))));
}

// Two panels are one tensor: at a distance that is a stride.
bool panels_fit(const MoeArgs& a) {
  if (!weights_fit(a, a.panel[0])) return false;
  if (a.panels == 1) return true;
  const ExpertWeights &first = a.panel[0], &second = a.panel[1];
  const auto bytes = static_cast<const char*>(second.data) - static_cast<const char*>(first.data);
  return weights_fit(a, second) && first.row_stride == second.row_stride &&
         first.expert_stride == second.expert_stride && first.scale_stride == second.scale_stride && bytes != 0 &&
         std::abs(bytes) < 2 * kMostStride;
}

// Activations and outputs: uniform rows, activations in 16 bytes.
bool rows_fit(const MoeArgs& a) {
  const int64_t size = a.dtype == DType::kE4M3 && a.x_scale ? 1 : 2;
  return a.out_rows.uniform() && a.x_rows.uniform() && aligned_to(a.x, 16) && a.x_rows.inner_stride * size % 16 == 0;
}

bool lists_fit(const MoeArgs& a, int64_t count) {
  if (a.ids) return a.assignments() <= 4096;
  return a.positions > 0 && aligned_to(a.sorted_token_ids, 16) && a.block_m % count == 0;
}

// Passes of `count` assignments that the lists may hold, and what the lists take.
struct ListSizes {
  int64_t candidates, words, listed_bytes, items_bytes, bits_bytes;
};
ListSizes list_sizes(const MoeArgs& a, int64_t count) {
  ListSizes s{};
  const int64_t assignments = a.assignments();
  s.candidates = a.ids ? std::min(assignments, a.experts) + assignments / count : ceil_div(a.positions, count);
  s.words = a.ids ? ceil_div(assignments, kWarp) : 0;
  s.listed_bytes = s.candidates * count * 4;
  s.items_bytes = ceil_div(16 + s.candidates * 4, 16) * 16;
  s.bits_bytes = a.ids ? 4 * ((s.words + 1) * a.experts + assignments) : 0;
  return s;
}

std::optional<MoeWarpPlan> fit(const MoeArgs& a) {
  const bool fp8 = a.dtype == DType::kE4M3, quantizes = fp8 && !a.x_scale;
  if (compute_capability() < 90 || (a.tile >= 0 && moe_tile(a.tile).kernel != MoeKernel::kWarp)) return {};
  if (a.tokens > kMostTokens || a.assignments() == 0 || a.experts == 0 || a.depth < 8 ||
      a.depth % (fp8 ? 16 : 8) != 0 || (fp8 && a.width % 4 != 0) || !lists_fit(a, 8))
    return {};
  if (!fits_32_bits(a.assignments()) || !fits_32_bits(a.width) || !fits_32_bits(a.depth * 2) ||
      !fits_32_bits(a.experts) || a.topk_weights_stride < 0)
    return {};
  if (!panels_fit(a) || !rows_fit(a)) return {};

  MoeWarpPlan plan{};
  const uint32_t slab_columns = kSlabPitch / size_of(a.dtype);
  const auto slabs = static_cast<uint32_t>(ceil_div(a.depth, slab_columns));
  const bool two = a.assignments() > kMostOneGroup * a.experts && lists_fit(a, 16);
  const bool deep = slabs > static_cast<uint32_t>(kMoeWarps * moe_steps(fp8));
  if (deep && (quantizes || !lists_fit(a, 16))) return {};
  plan.kernel = deep ? 2 : two ? 1 : 0;
  const MoeWarpKernel& kernel = kMoeWarpKernels[plan.kernel];
  const uint32_t count = kernel.groups * 8;
  const ListSizes lists = list_sizes(a, count);
  plan.candidates = static_cast<uint32_t>(lists.candidates);
  plan.words = static_cast<uint32_t>(lists.words);
  plan.boxes = a.depth % slab_columns == 0;
  plan.swapped = a.panels == 2 && a.panel[1].data < a.panel[0].data;
  plan.teams = 1;
  plan.tokens = static_cast<uint32_t>(a.tokens);
  plan.slots = static_cast<uint32_t>(a.slots);
  plan.steps = ceil_div(slabs, kMoeWarps);
  plan.warps = ceil_div(slabs, plan.steps);
  const int64_t tiles = ceil_div(a.width, a.panels == 2 ? 8 : kTileRows);
  if (!fits_32_bits(tiles * plan.candidates)) return {};
  plan.tiles = static_cast<uint32_t>(tiles);
  plan.blocks = static_cast<uint32_t>(kernel.blocks * sm_count());

  plan.stage_bytes = plan.warps * kSlabBytes;
  const int64_t partial_bytes = 2 * plan.warps * count * kPartialPitch * sizeof(float);
  const int64_t columns_bytes = 2 * count * 4 + (quantizes ? plan.warps * count * 4 : 0);
  const int64_t fixed = 1024 + partial_bytes + columns_bytes + lists.items_bytes + lists.listed_bytes;
  const int64_t each = plan.stage_bytes + 16 + (fp8 ? kScaleBytes : 0);
  const int64_t limit = kSharedOfSm / kernel.blocks - 1024, ring = kernel.blocks == 1 ? kRingOfOne : kRingOfTwo;
  if (lists.bits_bytes > partial_bytes || fixed + 2 * each > limit) return {};
  plan.stages = static_cast<uint32_t>(
      std::min({ring / plan.stage_bytes, (limit - fixed) / each, static_cast<int64_t>(kMostStages)}));
  plan.barriers_at = plan.stages * plan.stage_bytes;
  plan.scales_at = plan.barriers_at + plan.stages * 16;
  plan.partial_at = plan.scales_at + (fp8 ? plan.stages * kScaleBytes : 0);
  plan.columns_at = static_cast<uint32_t>(plan.partial_at + partial_bytes);
  plan.listed_at = static_cast<uint32_t>(plan.columns_at + columns_bytes);
  plan.items_at = static_cast<uint32_t>(plan.listed_at + lists.listed_bytes);
  plan.shared_bytes = static_cast<uint32_t>(plan.items_at + lists.items_bytes + 1024);
  return plan;
}

std::optional<MoeWarpPlan> sum_fit(const MoeArgs& a) {
  auto plan = fit(a);
  if (!plan) return {};
  const bool fp8 = a.dtype == DType::kE4M3;
  const bool two = a.assignments() > kMostOneGroup * a.experts && lists_fit(a, 16);
  plan->kernel = two ? 1 : 0;  // nothing is kept in registers here
  const uint32_t count = two ? 16 : 8;
  const ListSizes lists = list_sizes(a, count);
  plan->candidates = static_cast<uint32_t>(lists.candidates);
  const auto sms = static_cast<uint32_t>(sm_count());
  if (plan->tiles < sms / 2) return {};
  plan->blocks = std::min(plan->tiles, sms);

  // Two teams, where a ring holds a whole number of passes of both; else one of twice as many warps.
  const uint32_t slabs = plan->boxes ? static_cast<uint32_t>(a.depth * size_of(a.dtype) / kSlabPitch) : 0;
  plan->teams = kMostTeams;
  uint32_t multiple = kMostTeams * plan->steps;
  if (!plan->boxes || multiple * plan->stage_bytes > 128 * 1024) {
    plan->teams = multiple = 1;
    if (plan->boxes) {
      plan->steps = ceil_div(slabs, kMostTeams * kMoeWarps);
      plan->warps = ceil_div(slabs, plan->steps);
      plan->stage_bytes = plan->warps * kSlabBytes;
    }
  }
  const int64_t partial_bytes = int64_t{plan->teams} * 2 * plan->warps * count * kPartialPitch * sizeof(float);
  const int64_t results_bytes = a.assignments() * kTileRows * sizeof(float);
  const int64_t each = plan->stage_bytes + 16 + (fp8 ? kScaleBytes : 0);
  const int64_t fixed = 1024 + partial_bytes + results_bytes + 2 * lists.listed_bytes + lists.items_bytes;
  const int64_t limit = kSharedOfSm - 1024;
  const int64_t stages = std::min((limit - fixed) / each, static_cast<int64_t>(kMostStages));
  if (fixed > limit || lists.bits_bytes > partial_bytes || stages < 2 || stages < multiple) return {};
  const int64_t wanted = std::max<int64_t>(kRingOfSum / plan->stage_bytes, multiple);
  plan->stages = static_cast<uint32_t>(std::min(stages, wanted)) / multiple * multiple;
  plan->barriers_at = plan->stages * plan->stage_bytes;
  plan->scales_at = plan->barriers_at + plan->stages * 16;
  plan->partial_at = plan->scales_at + (fp8 ? plan->stages * kScaleBytes : 0);
  plan->results_at = static_cast<uint32_t>(plan->partial_at + partial_bytes);
  plan->listed_at = static_cast<uint32_t>(plan->results_at + results_bytes);
  plan->columns_at = static_cast<uint32_t>(plan->listed_at + lists.listed_bytes);
  plan->items_at = static_cast<uint32_t>(plan->columns_at + lists.listed_bytes);
  plan->shared_bytes = static_cast<uint32_t>(plan->items_at + lists.items_bytes + 1024);
  return plan;
}

}  // namespace

bool moe_warp_takes(const MoeArgs& args) { return (args.reduce ? sum_fit(args) : fit(args)).has_value(); }

bool moe_warp(Stream stream, const MoeArgs& args) {
  const auto plan = args.reduce ? sum_fit(args) : fit(args);
  if (!plan) return false;
  dispatch<bf16, f16, e4m3>(args.dtype, [&]<class T>() {
    args.reduce ? launch_moe_warp_sum<T>(stream, args, *plan) : launch_moe_warp<T>(stream, args, *plan);
  });
  return true;
}

}  // namespace kestrel::cuda
