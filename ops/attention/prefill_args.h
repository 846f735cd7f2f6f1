// What the prefill kernel is told.
#pragma once

#include <cuda.h>

#include "kestrel/hopper/divide.cuh"
#include "ops/attention/prefill_tile.h"

namespace kestrel::cuda {

struct PrefillArgs {
  // Boxes of 64 rows and the columns of a panel, where these are narrow of all panels but the last; and of the last.
  CUtensorMap q, k, v, q_last, k_last, v_last;
  AttentionProblem problem;
  uint32_t blocks;  // of the grid
  uint32_t tiles;   // of work, some of them perhaps empty
  uint32_t whole;   // of them for all groups; the others, of the last heads, for fewer: a last round less long
  uint32_t part_groups;
  uint32_t row_tiles;  // of one head: of one sequence, or of all packed ones together
  uint32_t heads;      // of all sequences
  uint32_t section;    // of them, worked on side by side, so that L2 holds their keys
  Divider<uint32_t> by_section_tiles, by_section, by_q_heads, by_group, by_page_size, by_parts;
  int groups;    // warpgroups with queries in this launch
  bool paired;   // a block's groups take long and short rows of one sequence, for launches of one wave
  bool turns;    // groups issue their products in turn
  bool once;     // no block has more than one tile of work
  bool fixed;    // no length comes from device memory
  bool wide;     // e4m3 rows lie in whole 16 bytes
  bool unclean;  // rows past a sequence's keys may hold NaN
};

}  // namespace kestrel::cuda
