// The wgmma kernels of both products and the tiles they are compiled for.
#pragma once

#include "ops/moe/moe_args.h"

namespace kestrel::cuda {

// A compiled tile (ops/moe/tile.h). kTokens: the most rows of x; in large tiles 16 more than a block of the alignment
// has, so that experts with somewhat more rows than two blocks have two tiles. kGroups: consumer warpgroups, each with
// 128 rows of weights (of a gate 64 of either panel). kBlocks: on an SM. kRuns: what a block's table holds of the list
// (wgmma_runs.cuh).
template <int kBlockM, int kBlockN, int kNumStages>
struct WgmmaTile {
  static constexpr int kGroups = kBlockN / 128, kTokens = kBlockM + (kGroups == 1 ? 0 : 16), kStages = kNumStages;
  static constexpr int kBlocks = kGroups == 1 ? 2 : 1, kRuns = kGroups == 1 ? 128 : 384;
  static_assert(kBlockM % 32 == 0 && kBlockM <= 128 && (kBlockN == 128 || kBlockN == 256) && kStages >= 2);
};

// False, with nothing done: these operands are not for it.
bool moe_wgmma(Stream stream, const MoeArgs& args);

// args.out may be fp32: down, or e4m3. `reduce` is not looked at. A file for each tile and type, which the build
// writes.
template <class T, class Tile>
void launch_moe_wgmma(Stream stream, const MoeArgs& args);

}  // namespace kestrel::cuda
