// The products of experts at few tokens, at the speed of their weights: on tensor cores by mma.sync.
#pragma once

#include <cstdint>
#include <optional>

#include "ops/moe/moe_args.h"

namespace kestrel::cuda {

// What a tile of 16 rows of weights is, which a thread has rows g and g + 8 of.
enum class MoeLayout : uint32_t {
  kGated,  // 8 rows of the first panel and the 8 of the second that belong to them
  kPair,   // the same, without a gate
  kPlain,  // 16 rows of the only panel
};

// The kernels compiled, for each dtype, tile and output: how many groups of 8 assignments of an expert a pass over its
// weights takes, whether activations stay in registers (else they come anew for each tile), teams of warps that take
// tiles in turn, blocks on an SM.
struct MoeWarpKernel {
  int groups;
  bool streamed;
  int teams, blocks;
};
inline constexpr MoeWarpKernel kMoeWarpKernels[] = {
    {1, false, 1, 2}, {2, false, 2, 1}, {2, true, 1, 1}, {1, false, 2, 1}};
constexpr int moe_warp_kernels(bool fp8) { return fp8 ? 4 : 3; }
// The same for all of them: the order of a sum depends on the depth alone.
inline constexpr int kMoeWarps = 8;  // of a team, at most, beside the producer

// With two groups and two teams their eight warps each are always there, and the producer has a warpgroup to itself,
// whose registers it leaves to them.
constexpr bool moe_shares_registers(MoeWarpKernel kernel) { return kernel.groups == 2 && kernel.teams == 2; }
constexpr int moe_threads(MoeWarpKernel kernel, int warps = kMoeWarps) {
  return moe_shares_registers(kernel) ? 20 * 32 : (kernel.teams * warps + 1) * 32;
}

// Granules of activations in registers: of 2048 columns.
constexpr int moe_steps(bool fp8) { return fp8 ? 2 : 4; }

// One call of a kernel. Offsets in shared memory count from its first multiple of 1024.
struct MoeWarpPlan {
  int kernel;
  bool boxes;              // a granule is one box; else a box for each slab: a depth that is no multiple of a slab's
  bool swapped;            // the second panel lies before the first
  uint32_t warps, steps;   // granules of `warps` slabs in the depth
  uint32_t tiles, blocks;  // tiles of an expert
  uint32_t candidates;     // passes, were every place in the list in use
  uint32_t words;          // of bits of an expert, where the lists are made of ids
  uint32_t tokens, slots;  // sums over experts
  uint32_t stages, stage_bytes;
  uint32_t barriers_at, scales_at, partial_at, columns_at, results_at, listed_at, items_at;
  uint32_t x_at, x_scales_at;  // where x is quantized
  uint32_t shared_bytes;
};

// The rule. Not taken: it is the plain kernel's.
bool moe_warp(Stream stream, const MoeArgs& args);
bool moe_warp_takes(const MoeArgs& args);

template <class T>
void launch_moe_warp(Stream stream, const MoeArgs& args, const MoeWarpPlan& plan);
// down with reduce, in one kernel
template <class T>
void launch_moe_warp_sum(Stream stream, const MoeArgs& args, const MoeWarpPlan& plan);

extern template void launch_moe_warp<bf16>(Stream, const MoeArgs&, const MoeWarpPlan&);
extern template void launch_moe_warp<f16>(Stream, const MoeArgs&, const MoeWarpPlan&);
extern template void launch_moe_warp<e4m3>(Stream, const MoeArgs&, const MoeWarpPlan&);
extern template void launch_moe_warp_sum<bf16>(Stream, const MoeArgs&, const MoeWarpPlan&);
extern template void launch_moe_warp_sum<f16>(Stream, const MoeArgs&, const MoeWarpPlan&);
extern template void launch_moe_warp_sum<e4m3>(Stream, const MoeArgs&, const MoeWarpPlan&);

}  // namespace kestrel::cuda
