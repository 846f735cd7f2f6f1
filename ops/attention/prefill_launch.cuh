// From the problem to a launch of the prefill kernel: the shape of the grid and the boxes of the copy engine.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kestrel/arithmetic.h"
#include "kestrel/tensor_map.h"
#include "ops/attention/prefill.h"
#include "ops/attention/prefill_kernel.cuh"

namespace kestrel::cuda {

template <class Tile>
void boxes_of(CUtensorMap* map, CUtensorMap* last, const void* data, DType dtype, int64_t columns, int64_t tokens,
              int64_t heads, int64_t batch, const AttentionStrides& stride) {
  constexpr uint32_t kPanel = Tile::kPanelColumns, kOthers = Tile::kPanels - 1;
  tokens = std::max<int64_t>(tokens, 1);
  const auto of_panel = [&](uint32_t panel) {
    return tensor_map({dtype,
                       data,
                       {columns, tokens, heads, batch},
                       {1, stride.token, stride.head, stride.batch},
                       {panel, kTileRows, 1, 1},
                       Tile::kSpan});
  };
  *last = of_panel(Tile::kLastColumns);
  if constexpr (Tile::kNarrow) {
    *map = tensor_map({dtype,
                       data,
                       {kPanel, tokens, kOthers, heads, batch},
                       {1, stride.token, kPanel, stride.head, stride.batch},
                       {kPanel, kTileRows, kOthers, 1, 1},
                       Tile::kSpan});
  } else if constexpr (kOthers > 0) {
    *map = Tile::kLastColumns == kPanel ? *last : of_panel(kPanel);
  }
}

template <class Tile>
void launch_prefill(Stream stream, const AttentionProblem& p, const PrefillShape& shape) {
  const int64_t packed_q = p.cu_seqlens_q ? 1 : p.batch, packed_k = p.cu_seqlens_k ? 1 : p.batch;
  PrefillArgs a{};
  a.problem = p;
  constexpr int64_t kFar = int64_t{1} << 30;  // past all keys
  a.problem.window_left = std::min(p.window_left, kFar);
  a.problem.window_right = std::min(p.window_right, kFar);
  a.problem.prefix_len = std::min(p.prefix_len, kFar);
  if constexpr (Tile::kSource != KeySource::kE4m3Rows)
    boxes_of<Tile>(&a.q, &a.q_last, p.q, p.q_dtype, p.head_size, p.q_len, p.q_heads, packed_q, p.q_stride);
  if constexpr (Tile::kBoxes) {
    boxes_of<Tile>(&a.k, &a.k_last, p.k, p.kv_dtype, p.head_size, p.k_len, p.k_heads, packed_k, p.k_stride);
    boxes_of<Tile>(&a.v, &a.v_last, p.v, p.kv_dtype, p.head_size, p.k_len, p.k_heads, packed_k, p.v_stride);
  }
  const int64_t pairs = packed_q * p.q_heads, row_tiles = row_tiles_of(p, shape.groups);
  const int64_t tiles = pairs * row_tiles;
  if (shape.persistent) {
    a.section = 1;  // the tiles of one head after one another
  } else {
    // Keys and values of the heads that are worked on at a time: about half of L2.
    const int64_t bytes = 2 * p.k_len * p.head_size * size_of(p.kv_dtype) * p.k_heads / p.q_heads;
    a.section = static_cast<uint32_t>(std::clamp<int64_t>((int64_t{34} << 20) / std::max<int64_t>(bytes, 1), 1, pairs));
  }
  // The heads that are left after whole rounds go to blocks in parts of as few groups as one more round can take.
  const int64_t blocks = prefill_blocks(p, shape, sm_count()), rounds = tiles / blocks;
  const int64_t heads = tiles % blocks ? rounds * blocks / row_tiles : pairs, whole = heads * row_tiles;
  int part_groups = 1;
  const auto parts = [&] { return ceil_div(p.q_len, part_groups * kTileRows); };
  while (whole + (pairs - heads) * parts() > (rounds + 1) * blocks) ++part_groups;
  a.part_groups = part_groups, a.by_parts = Divider<uint32_t>(parts());
  a.whole = static_cast<uint32_t>(whole), a.tiles = static_cast<uint32_t>(whole + (pairs - heads) * parts());
  a.blocks = static_cast<uint32_t>(blocks), a.once = blocks == tiles;
  a.row_tiles = static_cast<uint32_t>(row_tiles);
  a.heads = static_cast<uint32_t>(pairs);
  a.by_section_tiles = Divider<uint32_t>(row_tiles * a.section), a.by_section = Divider<uint32_t>(a.section);
  a.by_q_heads = Divider<uint32_t>(p.q_heads), a.by_group = Divider<uint32_t>(p.q_heads / p.k_heads);
  a.by_page_size = Divider<uint32_t>(std::max<int64_t>(p.page_size, 1));
  a.groups = shape.groups, a.paired = shape.paired, a.turns = shape.turns && shape.groups > 1;
  a.fixed = !(p.cu_seqlens_q || p.cu_seqlens_k || p.seqused_k || p.prefix_lens);
  const auto wide = [&](const void* data, const AttentionStrides& s) {
    return aligned_to(data, 16) && s.batch % 16 == 0 && s.token % 16 == 0 && s.head % 16 == 0;
  };
  a.wide = p.head_size % 16 == 0 && wide(p.k, p.k_stride) && wide(p.v, p.v_stride);
  a.unclean = Tile::kBoxes && (p.cu_seqlens_k || p.seqused_k);
  launch<prefill_kernel<Tile>>(
      stream, {blocks, (shape.groups + 1) * kGroupThreads, 1, static_cast<size_t>(Tile::kSharedBytes)}, a);
}

template <int kHead, KeySource kKeys, int kGroups, int kStages, int kSlots>
void launch_prefill(Stream stream, const AttentionProblem& p, const PrefillShape& shape) {
  dispatch<bf16, f16>(p.q_dtype, [&]<class Q>() {
    using T = std::conditional_t<kKeys == KeySource::kE4m3Rows, f16, Q>;
    launch_prefill<PrefillTile<T, Q, kHead, kKeys, kGroups, kStages, kSlots>>(stream, p, shape);
  });
}

}  // namespace kestrel::cuda
