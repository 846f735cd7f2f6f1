// The launch of a tile.
#pragma once

#include <algorithm>

#include "kestrel/launch.h"
#include "ops/attention/decode.cuh"

namespace kestrel::cuda {

template <class Tile>
void launch_decode(Stream stream, DecodeArgs& a, const DecodePlan& plan) {
  constexpr Merge kMerge = Tile::kMerge;
  a.least = plan.warps * Tile::kTokens;
  const int rows = Tile::kRows ? std::min(a.rows, 8) : Tile::kHeads;
  LaunchShape shape{.blocks = decode_blocks(plan, a.groups, a.batch), .threads = plan.warps * kWarp};
  if (kMerge != Merge::kGrid) {
    shape.blocks /= a.batch;
    shape.blocks_y = a.batch;
  }
  if (kMerge == Merge::kCluster) shape.cluster = plan.splits;
  // Four to eight parts for each lane of an element; of the splits one or two, their loads take longer.
  const int parts = plan.warps * (kMerge == Merge::kCluster ? plan.splits : 1);
  a.part_log = a.split_log = 0;
  while (8 << a.part_log < parts) ++a.part_log;
  while (a.split_log < 3 && rows * Tile::kSize / 4 << (a.split_log + 1) <= shape.threads) ++a.split_log;
  shape.shared_bytes = decode_shared_bytes(plan, a.rows);
  if constexpr (Tile::kWhole)
    if (a.q_len == 1 && a.rows <= 8 && !(a.features & ~a.kScales))
      return launch<decode_kernel<Simple<Tile>>>(stream, shape, a);
  launch<decode_kernel<Tile>>(stream, shape, a);
}

}  // namespace kestrel::cuda
