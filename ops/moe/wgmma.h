// The wgmma kernels of both products and the tiles they are compiled for.
#pragma once

#include "ops/moe/moe_args.h"

namespace kestrel::cuda {

// kTokens: the most rows of x of a tile, whatever the height of a block of the alignment. kGroups: consumer warpgroups,
// each with 128 rows of weights (of a gate 64 of either panel). kBlocks: on an SM. kRuns: experts that a block's table
// holds at a time.
struct WideTile {
  static constexpr int kTokens = 128, kGroups = 2, kStages = 4, kBlocks = 1, kRuns = 512;
};
struct NarrowTile {
  static constexpr int kTokens = 32, kGroups = 1, kStages = 5, kBlocks = 2, kRuns = 128;
};

enum class WgmmaTile { kNarrow, kWide };

// False, with nothing done: these operands are not for it.
bool moe_wgmma(Stream stream, const MoeArgs& args);

// args.out may be fp32: down, or e4m3. `reduce` is not looked at.
template <class T>
void launch_moe_wgmma(Stream stream, const MoeArgs& args, WgmmaTile tile);
extern template void launch_moe_wgmma<bf16>(Stream, const MoeArgs&, WgmmaTile);
extern template void launch_moe_wgmma<f16>(Stream, const MoeArgs&, WgmmaTile);
extern template void launch_moe_wgmma<e4m3>(Stream, const MoeArgs&, WgmmaTile);

}  // namespace kestrel::cuda
