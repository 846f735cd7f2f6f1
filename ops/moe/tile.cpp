#include "ops/moe/tile.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <shared_mutex>

#include "kestrel/contract.h"
#include "kestrel/cuda.h"
#include "ops/moe/compiled_tiles.h"
#include "ops/moe/moe.h"

namespace kestrel {
namespace {

struct Tuned {
  std::string gpu;
  MoeLayerSizes sizes;
  std::vector<MoePoint> points;
};

// What is embedded, until more is learned.
std::vector<Tuned>& tuned() {
  static std::vector<Tuned> all = embedded_tuned<Tuned>();
  return all;
}
std::shared_mutex tuned_mutex;

thread_local const char* last_kernel = "";

// They stay where they are, so that reading one takes no lock.
struct Added {
  MoeTile tile;
  MoeLaunch launch;
};
constexpr int kMostAdded = 256;
std::array<Added, kMostAdded> added;
std::atomic<int> added_count;

const std::string& gpu_name() {
  static const std::string name = [] {
    if constexpr (kHasCuda) return device_name();
    return std::string();
  }();
  return name;
}

// The points of these sizes: of the present GPU where several have some, which alone asks the driver.
const Tuned* find(const MoeLayerSizes& sizes) {
  const Tuned* found = nullptr;
  for (const Tuned& t : tuned()) {
    if (!(t.sizes == sizes)) continue;
    if (found && t.gpu != gpu_name()) continue;
    found = &t;
  }
  return found;
}

// f16 runs in the tiles of bf16.
const Tuned* find_or_alike(const MoeLayerSizes& sizes) {
  const Tuned* found = find(sizes);
  if (found || sizes.dtype != DType::kF16) return found;
  found = find({sizes.experts, sizes.hidden, sizes.inner, DType::kBF16});
  if (!found) return nullptr;
  const auto takes = [](int tile) { return moe_tile(tile).takes(DType::kF16); };
  const auto all = [&](const MoePoint& p) { return takes(p.up) && takes(p.down); };
  return std::all_of(found->points.begin(), found->points.end(), all) ? found : nullptr;
}

// Without points: by the assignments of an expert, were there eight for a token. Of H200 measurements with 64 experts.
struct Rule {
  int most_rows;  // of an expert
  MoeKernel kernel;
  int block_m;
};
constexpr Rule kRules[] = {{2, MoeKernel::kWarp, 16}, {16, MoeKernel::kWgmma, 32}, {0, MoeKernel::kWgmma, 128}};

constexpr int tile_of(const Rule& rule, DType dtype) {
  for (int i = 0; i < kMoeTileCount; ++i)
    if (kMoeTiles[i].kernel == rule.kernel && kMoeTiles[i].block_m == rule.block_m && kMoeTiles[i].takes(dtype))
      return i;
  return -1;
}

constexpr bool rules_have_tiles() {
  for (const Rule& rule : kRules)
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kE4M3})
      if (tile_of(rule, dtype) < 0) return false;
  return true;
}
static_assert(rules_have_tiles(), "ops/moe/tiles.json lacks a tile that the rule asks for");

template <class Visit>
void visit_ranges(const MoeLayerSizes& sizes, Visit&& visit) {
  const std::shared_lock lock(tuned_mutex);
  int64_t first = 0;
  if (const Tuned* found = find_or_alike(sizes)) {
    for (size_t i = 0; i < found->points.size(); ++i) {
      const MoePoint& p = found->points[i];
      visit(MoeRange{first, p.up, p.down});
      // Of two counts as near the smaller.
      if (i + 1 < found->points.size()) first = (p.tokens + found->points[i + 1].tokens) / 2 + 1;
    }
    return;
  }
  for (const Rule& rule : kRules) {
    const int tile = tile_of(rule, sizes.dtype);
    visit(MoeRange{first, tile, tile});
    first = rule.most_rows * std::max<int64_t>(sizes.experts, 1) / 8 + 1;
  }
}

MoeRange range_of(const MoeLayerSizes& sizes, int64_t tokens) {
  MoeRange chosen{0, -1, -1};
  visit_ranges(sizes, [&](const MoeRange& range) {
    if (range.first <= tokens) chosen = range;
  });
  return chosen;
}

}  // namespace

const char* moe_last_kernel() { return last_kernel; }
void moe_note_kernel(const char* name) { last_kernel = name; }

int moe_tile_count() { return kMoeTileCount + added_count.load(std::memory_order_acquire); }

const MoeTile& moe_tile(int64_t index) {
  return index < kMoeTileCount ? kMoeTiles[index] : added[index - kMoeTileCount].tile;
}

MoeLaunch moe_added_launch(int64_t index) { return added[index - kMoeTileCount].launch; }

int moe_add_tile(const MoeTile& tile, MoeLaunch launch) {
  const std::unique_lock lock(tuned_mutex);
  const int count = added_count.load(std::memory_order_relaxed);
  if (count == kMostAdded) throw Error(ErrorKind::kRuntimeError, "moe_add_tile: 256 tiles are added already");
  added[count] = {tile, launch};
  added_count.store(count + 1, std::memory_order_release);
  return kMoeTileCount + count;
}

std::vector<MoeRange> moe_ranges(const MoeLayerSizes& sizes) {
  std::vector<MoeRange> ranges;
  visit_ranges(sizes, [&](const MoeRange& range) { ranges.push_back(range); });
  return ranges;
}

int moe_tile_for(const MoeLayerSizes& sizes, int64_t tokens, int64_t block_m, bool down) {
  const MoeRange range = range_of(sizes, tokens);
  const int tile = down ? range.down : range.up;
  return tile >= 0 && moe_tile(tile).block_m == block_m ? tile : -1;
}

void moe_learn(const std::string& gpu, const MoeLayerSizes& sizes, std::vector<MoePoint> points) {
  const std::unique_lock lock(tuned_mutex);
  std::vector<Tuned>& all = tuned();
  const auto same = [&](const Tuned& t) { return t.gpu == gpu && t.sizes == sizes; };
  all.erase(std::remove_if(all.begin(), all.end(), same), all.end());
  if (!points.empty()) all.push_back({gpu, sizes, std::move(points)});
}

void moe_forget() {
  const std::unique_lock lock(tuned_mutex);
  tuned().clear();
}

MoeChoice moe_choice(int64_t tokens, int64_t experts, int64_t hidden, int64_t inner, DType dtype) {
  Contract c("moe_choice");
  c.require(dtype == DType::kBF16 || dtype == DType::kF16 || dtype == DType::kE4M3, "dtype",
            "bfloat16, float16 or float8_e4m3fn", name_of(dtype));
  const MoeRange range = range_of({experts, hidden, inner, dtype}, std::max<int64_t>(tokens, 0));
  return {moe_tile(range.up).block_m, range.up, range.down};
}

}  // namespace kestrel
