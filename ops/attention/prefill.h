// FlashAttentionFwd: the kernel for many queries. See prefill_kernel.cuh.
#pragma once

#include "ops/attention/prefill_tile.h"

namespace kestrel::cuda {

// Runs it where it serves the problem; otherwise nothing happens and it returns false.
bool attention_prefill(Stream stream, const AttentionProblem& problem);

// How a launch spreads its work.
struct PrefillShape {
  int groups;       // of 64 queries in a block
  bool paired;      // see PrefillArgs
  bool turns;       // likewise
  bool persistent;  // a block on each SM takes several tiles of work; otherwise there is a block for each
};

// Blocks' worth of work for each head: of one sequence, or of all packed ones, each of which may end with a part.
inline int64_t row_tiles_of(const AttentionProblem& p, int groups) {
  const int64_t rows = groups * kTileRows;
  return (p.q_len + rows - 1) / rows + (p.cu_seqlens_q ? p.batch : 0);
}

// By head size: each serves smaller ones too.
using PrefillHead = void(Stream, const AttentionProblem&, KeySource, const PrefillShape&);
PrefillHead prefill_64, prefill_72, prefill_80, prefill_96, prefill_128, prefill_256;

}  // namespace kestrel::cuda
