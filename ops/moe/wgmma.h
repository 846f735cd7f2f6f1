// The wgmma kernels of both products and the tiles they are compiled for.
#pragma once

#include "ops/moe/moe_args.h"

namespace kestrel::cuda {

// A compiled tile (ops/moe/tile.h). kTokens: the most rows of x. kGroups: consumer warpgroups, each with 128 rows of
// weights (of a gate 64 of either panel). kBlocks: on an SM. kRuns: experts that the block's table holds at a time.
template <int kBlockM, int kBlockN, int kNumStages>
struct WgmmaTile {
  static constexpr int kTokens = kBlockM, kGroups = kBlockN / 128, kStages = kNumStages;
  static constexpr int kBlocks = kGroups == 1 ? 2 : 1, kRuns = kGroups == 1 ? 128 : 512;
  // Results leave 32 rows at a time.
  static_assert(kTokens % 32 == 0 && kTokens <= 128 && (kBlockN == 128 || kBlockN == 256) && kStages >= 2);
};

// False, with nothing done: these operands are not for it.
bool moe_wgmma(Stream stream, const MoeArgs& args);

// args.out may be fp32: down, or e4m3. `reduce` is not looked at. A file for each tile and type, which the build
// writes.
template <class T, class Tile>
void launch_moe_wgmma(Stream stream, const MoeArgs& args);

}  // namespace kestrel::cuda
