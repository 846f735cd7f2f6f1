// Which products of experts the warp kernels take, and how.
#include <algorithm>
#include <cstdlib>

#include "kestrel/cuda.h"
#include "kestrel/hopper/vec.cuh"
#include "ops/moe/parts.h"
#include "ops/moe/tile.h"
#include "ops/moe/warp_sum.cuh"

namespace kestrel::cuda {
namespace {

constexpr int64_t kMostTokens = 64;
constexpr int64_t kMostOneGroup = 3;          // assignments of an expert, on average: seldom more than 8 then
constexpr uint32_t kSharedOfSm = 228 * 1024;  // of which each block takes 1 KB for the system
constexpr uint32_t kRingOfTwo = 64 * 1024;    // two blocks on an SM
constexpr uint32_t kRingOfOne = 144 * 1024;
constexpr uint32_t kRingOfSum = 96 * 1024;
constexpr uint32_t kRingOfTeams = 64 * 1024;  // one group: beside it there is room for a block of the sums
constexpr uint32_t kMostStages = 16;
// More blocks must not fit on an SM than it shall have: they would gather on some while others have none (the layer in
// fp8 at 16 tokens: 112 us instead of 92).
constexpr uint32_t kMoreThanThird = 77 * 1024, kMoreThanHalf = 115 * 1024;
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
  return a.out_rows.uniform() && a.x_rows.uniform() && aligned_to(a.x, 16) &&
         a.x_rows.inner_stride * size_of(a.quantize_from.value_or(a.dtype)) % 16 == 0;
}

bool lists_fit(const MoeArgs& a, int64_t count) {
  if (!a.sorted_token_ids) return a.assignments() <= 4096;
  return a.positions > 0 && aligned_to(a.sorted_token_ids, 16) && a.block_m % count == 0;
}

// Passes of `count` assignments that the lists may hold, and what the lists take.
struct ListSizes {
  int64_t candidates, words, listed_bytes, items_bytes, bits_bytes;
};
ListSizes list_sizes(const MoeArgs& a, int64_t count) {
  ListSizes s{};
  const int64_t assignments = a.assignments();
  const bool by_ids = !a.sorted_token_ids;
  s.candidates = by_ids ? std::min(assignments, a.experts) + assignments / count : ceil_div(a.positions, count);
  s.words = by_ids ? ceil_div(assignments, kWarp) : 0;
  s.listed_bytes = s.candidates * count * 4;
  s.items_bytes = ceil_div(16 + s.candidates * 4, 16) * 16;
  s.bits_bytes = by_ids ? 4 * ((s.words + 1) * a.experts + assignments) : 0;
  return s;
}

// Where two groups pay.
bool wants_two(const MoeArgs& a) { return a.assignments() > kMostOneGroup * a.experts && lists_fit(a, 16); }

std::optional<MoeWarpPlan> fit(const MoeArgs& a) {
  const bool fp8 = a.dtype == DType::kE4M3;
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
  const int64_t tiles = ceil_div(a.width, a.panels == 2 ? 8 : kTileRows);
  const bool deep = slabs > static_cast<uint32_t>(kMoeWarps * moe_steps(fp8));
  if (deep && !lists_fit(a, 16)) return {};
  plan.steps = ceil_div(slabs, kMoeWarps);
  plan.warps = ceil_div(slabs, plan.steps);
  plan.stage_bytes = plan.warps * kSlabBytes;
  plan.kernel = deep ? 2 : wants_two(a) && tiles >= 2 ? 1 : 0;
  if (plan.kernel == 0 && fp8 && tiles >= 2 && 2 * plan.steps * plan.stage_bytes <= kRingOfTeams) plan.kernel = 3;
  // A warp quantizes a row.
  if (a.quantize_from && (plan.kernel != 3 || !a.gate || a.out.dtype != DType::kF32 || a.tokens > 2 * plan.warps ||
                          a.depth > kMostRowColumns || size_of(*a.quantize_from) != 2))
    return {};
  const MoeWarpKernel& kernel = kMoeWarpKernels[plan.kernel];
  const uint32_t count = kernel.groups * 8;
  const ListSizes lists = list_sizes(a, count);
  plan.candidates = static_cast<uint32_t>(lists.candidates);
  plan.words = static_cast<uint32_t>(lists.words);
  plan.boxes = a.depth % slab_columns == 0;
  plan.swapped = a.panels == 2 && a.panel[1].data < a.panel[0].data;
  plan.tokens = static_cast<uint32_t>(a.tokens);
  plan.slots = static_cast<uint32_t>(a.slots);
  if (!fits_32_bits(tiles * plan.candidates)) return {};
  plan.tiles = static_cast<uint32_t>(tiles);
  plan.blocks = static_cast<uint32_t>(kernel.blocks * sm_count());

  const int64_t partial_bytes = kernel.teams * 2 * plan.warps * count * kPartialPitch * sizeof(float);
  const int64_t columns_bytes = kernel.teams * 2 * count * sizeof(float);
  const int64_t x_bytes = a.quantize_from ? a.tokens * (row_pitch(static_cast<uint32_t>(a.depth)) + 4) + 16 : 0;
  const int64_t fixed = 1024 + partial_bytes + columns_bytes + lists.items_bytes + lists.listed_bytes + x_bytes;
  const int64_t each = plan.stage_bytes + 16 + (fp8 ? kScaleBytes : 0);
  const int64_t limit = kSharedOfSm / kernel.blocks - 1024;
  const int64_t ring = kernel.blocks == 2 ? kRingOfTwo : plan.kernel == 3 ? kRingOfTeams : kRingOfOne;
  // With two teams a whole number of tiles of both: else the phases of a stage could be taken for one another.
  const int64_t multiple = kernel.teams == 1 ? 1 : kernel.teams * plan.steps;
  const int64_t stages =
      std::min({ring / plan.stage_bytes, (limit - fixed) / each, static_cast<int64_t>(kMostStages)}) / multiple *
      multiple;
  if (lists.bits_bytes > partial_bytes || fixed > limit || stages < std::max<int64_t>(2, multiple)) return {};
  plan.stages = static_cast<uint32_t>(stages);
  plan.barriers_at = plan.stages * plan.stage_bytes;
  plan.scales_at = plan.barriers_at + plan.stages * 16;
  plan.partial_at = plan.scales_at + (fp8 ? plan.stages * kScaleBytes : 0);
  plan.columns_at = static_cast<uint32_t>(plan.partial_at + partial_bytes);
  plan.listed_at = static_cast<uint32_t>(plan.columns_at + columns_bytes);
  plan.items_at = static_cast<uint32_t>(plan.listed_at + lists.listed_bytes);
  plan.x_at = static_cast<uint32_t>(plan.items_at + lists.items_bytes);
  plan.x_scales_at = plan.x_at + plan.tokens * row_pitch(static_cast<uint32_t>(a.depth));
  plan.shared_bytes = std::max(static_cast<uint32_t>(plan.items_at + lists.items_bytes + x_bytes + 1024),
                               kernel.blocks == 2 ? kMoreThanThird : kMoreThanHalf);
  return plan;
}

// Sums in one kernel: where a ring holds a whole number of passes of both teams, and tiles are enough to go round. A
// block reads all activations, from L2, which is too much where experts have many.
std::optional<MoeWarpPlan> sum_fit(const MoeArgs& a) {
  auto plan = fit(a);
  if (!plan || wants_two(a) || !plan->boxes) return {};
  const bool fp8 = a.dtype == DType::kE4M3;
  plan->kernel = 0;
  const uint32_t count = 8, multiple = kSumTeams * plan->steps;
  const ListSizes lists = list_sizes(a, count);
  plan->candidates = static_cast<uint32_t>(lists.candidates);
  const auto sms = static_cast<uint32_t>(sm_count());
  if (plan->tiles < sms / 2 || multiple * plan->stage_bytes > 128 * 1024) return {};
  plan->blocks = std::min(plan->tiles, sms);

  const int64_t partial_bytes = int64_t{kSumTeams} * 2 * plan->warps * count * kPartialPitch * sizeof(float);
  const int64_t results_bytes = a.assignments() * kTileRows * sizeof(float);
  const int64_t each = plan->stage_bytes + 16 + (fp8 ? kScaleBytes : 0);
  const int64_t fixed = 1024 + partial_bytes + results_bytes + 2 * lists.listed_bytes + lists.items_bytes;
  const int64_t limit = kSharedOfSm - 1024;
  const int64_t stages = std::min((limit - fixed) / each, static_cast<int64_t>(kMostStages));
  if (fixed > limit || lists.bits_bytes > partial_bytes || stages < multiple) return {};
  const int64_t wanted = std::max<int64_t>(kRingOfSum / plan->stage_bytes, multiple);
  plan->stages = static_cast<uint32_t>(std::min(stages, wanted)) / multiple * multiple;
  plan->barriers_at = plan->stages * plan->stage_bytes;
  plan->scales_at = plan->barriers_at + plan->stages * 16;
  plan->partial_at = plan->scales_at + (fp8 ? plan->stages * kScaleBytes : 0);
  plan->results_at = static_cast<uint32_t>(plan->partial_at + partial_bytes);
  plan->listed_at = static_cast<uint32_t>(plan->results_at + results_bytes);
  plan->columns_at = static_cast<uint32_t>(plan->listed_at + lists.listed_bytes);
  plan->items_at = static_cast<uint32_t>(plan->columns_at + lists.listed_bytes);
  plan->shared_bytes = std::max(static_cast<uint32_t>(plan->items_at + lists.items_bytes + 1024), kMoreThanHalf);
  return plan;
}

// Sums by way of fp32 parts in the workspace; none where they do not fit.
std::optional<MoeWarpPlan> parts_fit(const MoeArgs& a) {
  if (columns_of_parts(a, DType::kF32) < a.width) return {};
  return fit(product_to_parts(a, DType::kF32, 0, a.width));
}

}  // namespace

bool moe_warp_takes(const MoeArgs& args) {
  if (!args.reduce || sum_fit(args)) return fit(args).has_value();
  return parts_fit(args).has_value();
}

bool moe_warp(Stream stream, const MoeArgs& args) {
  bool taken = true;
  dispatch<bf16, f16, e4m3>(args.dtype, [&]<class T>() {
    if (args.reduce) {
      if (const auto plan = sum_fit(args)) return launch_moe_warp_sum<T>(stream, args, *plan);
      if (const auto plan = parts_fit(args))
        return sum_of_parts(stream, args, DType::kF32, args.width,
                            [&](const MoeArgs& product) { launch_moe_warp<T>(stream, product, *plan); });
    } else if (const auto plan = fit(args)) {
      return launch_moe_warp<T>(stream, args, *plan);
    }
    taken = false;
  });
  return taken;
}

}  // namespace kestrel::cuda
