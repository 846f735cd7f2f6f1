// The compiled tiles of a pair of types.
#pragma once

#include <algorithm>

#include "kestrel/launch.h"
#include "ops/attention/decode.cuh"

namespace kestrel::cuda {

template <class Tile>
void launch_tile(Stream stream, DecodeArgs& a, const DecodePlan& plan) {
  constexpr Merge kMerge = Tile::kMerge;
  a.least = plan.warps * Tile::kTokens;
  const int rows = Tile::kRows ? std::min(a.rows, 8) : Tile::kHeads;
  LaunchShape shape{.blocks = a.groups, .threads = plan.warps * kWarp, .blocks_y = a.batch};
  if (kMerge == Merge::kCluster) {
    shape.blocks = int64_t{a.groups} * plan.splits;
    shape.cluster = plan.splits;
  }
  if (kMerge == Merge::kGrid) {
    const int64_t whole = int64_t{a.groups} * a.batch;
    shape.blocks = plan.slots ? whole + plan.slots : whole * plan.splits;
    shape.blocks_y = 1;
  }
  // Four to eight parts for each lane of an element; of the splits one or two, their loads take longer.
  const int parts = plan.warps * (kMerge == Merge::kCluster ? plan.splits : 1);
  a.part_log = a.split_log = 0;
  while (8 << a.part_log < parts) ++a.part_log;
  while (a.split_log < 3 && rows * Tile::kSize / 4 << (a.split_log + 1) <= shape.threads) ++a.split_log;
  shape.shared_bytes = merge_bytes<Tile>(rows, plan.warps, plan.splits);
  launch<decode_kernel<Tile>>(stream, shape, a);
}

template <class Q, class KV, int kSize, int kHeads, int kBatches, bool kWhole, int kMostThreads>
bool try_tile(Stream stream, DecodeArgs& a, const DecodePlan& plan) {
  if (plan.size != kSize || plan.heads != kHeads || plan.batches != kBatches || kWhole != (a.head_size == kSize) ||
      plan.warps * kWarp > kMostThreads)
    return false;
  switch (plan.merge) {
    case Merge::kBlock:
      launch_tile<DecodeTile<Q, KV, kSize, kHeads, kBatches, Merge::kBlock, kWhole, kMostThreads>>(stream, a, plan);
      break;
    case Merge::kCluster:
      launch_tile<DecodeTile<Q, KV, kSize, kHeads, kBatches, Merge::kCluster, kWhole, kMostThreads>>(stream, a, plan);
      break;
    case Merge::kGrid:
      launch_tile<DecodeTile<Q, KV, kSize, kHeads, kBatches, Merge::kGrid, kWhole, kMostThreads>>(stream, a, plan);
      break;
  }
  return true;
}

template <class Q, class KV>
bool launch_decode(Stream stream, DecodeArgs& a, const DecodePlan& plan) {
  constexpr bool kNarrow = sizeof(KV) == 1;
  return try_tile<Q, KV, 64, 1, 2, true, 512>(stream, a, plan) ||
             try_tile<Q, KV, 64, 2, 2, true, 512>(stream, a, plan) ||
             (kNarrow && try_tile < Q, KV, 64, kNarrow ? 4 : 2, 2, true, 512 > (stream, a, plan)) ||
             try_tile<Q, KV, 64, 0, 2, true, 384>(stream, a, plan) ||
             try_tile<Q, KV, 64, 0, 2, false, 384>(stream, a, plan) || try_tile < Q,
         KV, 128, 0, 1, true, kNarrow ? 512 : 384 > (stream, a, plan) || try_tile < Q, KV, 128, 0, 2, true,
         kNarrow ? 384 : 256 > (stream, a, plan) || try_tile < Q, KV, 128, 0, 1, false,
         kNarrow ? 512 : 384 > (stream, a, plan);
}

}  // namespace kestrel::cuda
