// What a block of the prefill kernel holds: up to kGroups warpgroups of 64 query rows each, tiles of 64 keys. In
// shared memory every tile is panels of [64 rows][kSpan bytes], swizzled over as many, the last one partly filled where
// the head size is no multiple of a panel's columns.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/attention/plan.h"

namespace kestrel::cuda {

constexpr int kTileRows = 64;  // queries of a group, and keys of a tile
constexpr int kGroupThreads = 128;
constexpr int kMostGroups = 4;
constexpr int kPlanBytes = 160;

// T: what the products take. Out: the type of queries and output. kHead: columns of the heads, a multiple of 8.
template <class T_, class Out_, int kHead_, KeySource kSource_, int kGroups_, int kStages_, int kQuerySlots_>
struct PrefillTile {
  using T = T_;
  using Out = Out_;
  static constexpr KeySource kSource = kSource_;
  static constexpr bool kBoxes = kSource == KeySource::kBoxes;
  static constexpr int kHead = kHead_, kGroups = kGroups_, kStages = kStages_, kQuerySlots = kQuerySlots_;
  // Panels of half the width: a tile of 72 columns takes 12 KB and not 16, but short rows are slower to copy.
  static constexpr bool kNarrow = kGroups == 4 && kHead > 64;
  static constexpr int kSpan = kNarrow ? 64 : 128;
  static constexpr int kPanelColumns = kSpan / 2, kPanelBytes = kTileRows * kSpan;
  static constexpr int kPanels = (kHead + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kLastColumns = kHead - (kPanels - 1) * kPanelColumns;  // of the last panel
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kSteps = (kHead + 15) / 16;  // of 16 columns, in q k^T
  // The sums of the weights come out of the product with the values, as one more column block of ones, where the
  // products wait for the exponentials anyhow: 1916 -> 1791 us at head size 64 and 16384 keys. Four groups have
  // registers for 72 columns in all.
  static constexpr bool kSumsByProduct = kHead <= (kNarrow ? 64 : 72);
  static constexpr int kOutColumns = kSumsByProduct ? kHead + 8 : kHead;
  static constexpr bool kOnesPanel = kSumsByProduct && kLastColumns == kPanelColumns;
  static constexpr int kOnesBytes = kOnesPanel ? 16 * 128 : 0;
  static constexpr int kThreads = (kGroups + 1) * kGroupThreads;
  // Registers of a thread in a group, and in the loading warpgroup: all of a launch's.
  static constexpr int kRegisters = kGroups == 4                  ? 112
                                    : kGroups == 3                ? (kBoxes                        ? 152
                                                                     : kSource == KeySource::kRows ? 144
                                                                                                   : 136)
                                    : kBoxes                      ? 232
                                    : kSource == KeySource::kRows ? 216
                                    : kHead > 128                 ? 208
                                                                  : 184;
  static constexpr int kLoaderRegisters = kGroups == 4   ? 32
                                          : kGroups == 3 ? 512 - 3 * kRegisters
                                                         : 504 - 2 * kRegisters;

  // No registers are left for turns, nor for more than one tile of work; tiles.json's rule gives them none.
  static constexpr bool kLarge = kHead > 128;

  static constexpr int kQueryBytes = kGroups * kTileBytes;  // of a slot
  static constexpr int kKeysAt = kQuerySlots * kQueryBytes, kValuesAt = kKeysAt + kStages * kTileBytes;
  static constexpr int kOnesAt = kValuesAt + kStages * kTileBytes, kPlansAt = kOnesAt + kOnesBytes;
  static constexpr int kBarriersAt = kPlansAt + kQuerySlots * kPlanBytes;
  // Full and empty: of the stages, the query slots; and the slots' plans.
  static constexpr int kMissingAt = kBarriersAt + 16 * (kStages + kQuerySlots) + 8 * kQuerySlots;
  static constexpr int kRowsAt = kBoxes ? kMissingAt : (kMissingAt + kStages * 8 + 15) / 16 * 16;
  static constexpr int kPagesAt = kRowsAt + (kBoxes ? 0 : kGroupThreads * 8);
  // Of rows: steps whose pages are known before they are needed, and whose e4m3 rows lie here before their conversion.
  static constexpr int kPageBytes = kGroupThreads * 4;
  static constexpr int kRawBytes = kSource == KeySource::kE4m3Rows ? 2 * kTileRows * kHead : 0;
  static constexpr int kAhead = kBoxes ? 0
                                : kSource == KeySource::kRows
                                    ? kStages
                                    : std::min(4, ((226 << 10) - kPagesAt) / (kPageBytes + kRawBytes + 8));
  static constexpr int kRawAt = (kPagesAt + kAhead * kPageBytes + 127) / 128 * 128,
                       kRawMissingAt = kRawAt + kAhead * kRawBytes;
  static constexpr int kSharedBytes = kRawMissingAt + (kRawBytes ? kAhead * 8 : 0) + 1024;
  static_assert(kSharedBytes <= 227 << 10);
};

template <int kHead, KeySource kKeys, int kGroups, int kStages, int kSlots,
          class Tile = PrefillTile<bf16, bf16, kHead, kKeys, kGroups, kStages, kSlots>>
inline constexpr PrefillRow kPrefillRow = {
    kHead, kKeys, kGroups, kStages, kSlots, Tile::kSharedBytes, Tile::kRegisters, Tile::kLoaderRegisters};

}  // namespace kestrel::cuda
