// What a block of the prefill kernel holds: up to kGroups warpgroups of 64 query rows each, tiles of 64 keys. In
// shared memory every tile is panels of [64 rows][128 bytes] with the 128-byte swizzle, the last one partly filled
// where the head size is no multiple of 64.
#pragma once

#include <cuda.h>

#include <cstdint>

#include <kestrel/tensor.h>

#include "kestrel/hopper/divide.cuh"
#include "ops/attention/problem.h"

namespace kestrel::cuda {

constexpr int kTileRows = 64;  // queries of a group, and keys of a tile
constexpr int kPanelColumns = 64;
constexpr int kPanelBytes = kTileRows * kPanelColumns * 2;
constexpr int kGroupThreads = 128;
constexpr int kMostGroups = 4;
constexpr int kPlanBytes = 144;

// How keys and values come into shared memory: in boxes of the copy engine; or row by row, as they are or converted.
enum class KeySource { kBoxes, kRows, kE4m3Rows };

// T: what the products take. Out: the type of queries and output. kHead: columns of the heads, a multiple of 8.
template <class T_, class Out_, int kHead_, KeySource kSource_, int kGroups_, int kStages_, int kQuerySlots_>
struct PrefillTile {
  using T = T_;
  using Out = Out_;
  static constexpr KeySource kSource = kSource_;
  static constexpr bool kBoxes = kSource == KeySource::kBoxes;
  static constexpr int kHead = kHead_, kGroups = kGroups_, kStages = kStages_, kQuerySlots = kQuerySlots_;
  static constexpr int kPanels = (kHead + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kLastColumns = kHead - (kPanels - 1) * kPanelColumns;  // of the last panel
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kSteps = (kHead + 15) / 16;  // of 16 columns, in q k^T
  // The sums of the weights come out of the product with the values, as one more column block of ones, where the
  // products wait for the exponentials anyhow: 1916 -> 1791 us at head size 64 and 16384 keys.
  static constexpr bool kSumsByProduct = kHead <= 72;
  static constexpr int kOutColumns = kSumsByProduct ? kHead + 8 : kHead;
  static constexpr bool kOnesPanel = kSumsByProduct && kLastColumns == kPanelColumns;
  static constexpr int kOnesBytes = kOnesPanel ? 16 * 128 : 0;
  static constexpr int kThreads = (kGroups + 1) * kGroupThreads;
  // Registers of a thread in a group, and in the loading warpgroup: all of a launch's.
  static constexpr int kRegisters = kGroups == 4                  ? 112
                                    : kGroups == 3                ? (kBoxes || kHead > 80 ? 152
                                                                     : kHead > 64         ? 136
                                                                                          : 128)
                                    : kBoxes                      ? 232
                                    : kSource == KeySource::kRows ? 216
                                                                  : 176;
  static constexpr int kLoaderRegisters = kGroups == 4   ? 32
                                          : kGroups == 3 ? 512 - 3 * kRegisters
                                                         : 504 - 2 * kRegisters;
  // Tiles whose rows' pages are known before they are needed; as many e4m3 tiles wait in registers.
  static constexpr int kAhead = kSource == KeySource::kRows ? 4 : kHead <= 64 ? 3 : kHead <= 80 ? 1 : 2;

  static constexpr int kQueryBytes = kGroups * kTileBytes;  // of a slot
  static constexpr int kKeysAt = kQuerySlots * kQueryBytes, kValuesAt = kKeysAt + kStages * kTileBytes;
  static constexpr int kOnesAt = kValuesAt + kStages * kTileBytes, kPlansAt = kOnesAt + kOnesBytes;
  static constexpr int kMissingAt = kPlansAt + kQuerySlots * kPlanBytes;
  static constexpr int kBarriersAt = kMissingAt + (kBoxes ? 0 : kStages * 8);
  // Full and empty: of the keys' stages, the values' stages, the query slots; and the slots' plans.
  static constexpr int kSharedBytes = kBarriersAt + 16 * (2 * kStages + kQuerySlots) + 8 * kQuerySlots + 1024;
  static_assert(kSharedBytes <= 227 << 10);
};

struct PrefillArgs {
  // Boxes of 64 rows and 64 columns; with a partial last panel, others of its width.
  CUtensorMap q, k, v, q_last, k_last, v_last;
  AttentionProblem problem;
  uint32_t blocks;     // of the grid
  uint32_t tiles;      // blocks' worth of work, some of them perhaps empty
  uint32_t row_tiles;  // of one head: of one sequence, or of all packed ones together
  uint32_t heads;      // of all sequences
  uint32_t section;    // of them, worked on side by side, so that L2 holds their keys
  Divider<uint32_t> by_section_tiles, by_section, by_q_heads, by_group, by_page_size;
  int groups;    // warpgroups with queries in this launch
  bool paired;   // a block's groups take long and short rows of one sequence, for launches of one wave
  bool turns;    // groups issue their products in turn
  bool fixed;    // no length comes from device memory
  bool unclean;  // rows past a sequence's keys may hold NaN
};

}  // namespace kestrel::cuda
