// Which operands the wgmma kernels take, and by which tile.
#include <algorithm>

#include "kestrel/launch.h"
#include "ops/moe/compiled_wgmma.h"
#include "ops/moe/parts.h"
#include "ops/moe/wgmma.h"

namespace kestrel::cuda {
namespace {

bool whole_chunks(int64_t elements, DType dtype) { return elements * size_of(dtype) % 16 == 0; }

bool rows_fit(const void* data, const Rows& rows, DType dtype) {
  const int64_t levels = rows.count > rows.inner ? (rows.count - 1) / rows.inner : 0;
  const int64_t last = levels * rows.outer_stride + std::min(rows.count, rows.inner) * rows.inner_stride;
  return aligned_to(data, 16) && whole_chunks(rows.inner_stride, dtype) && whole_chunks(rows.outer_stride, dtype) &&
         rows.inner_stride >= 0 && rows.outer_stride >= 0 && last * size_of(dtype) / 16 < (int64_t{1} << 32) - 1;
}

bool fits(const MoeArgs& a, DType out) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (compute_capability() != 90 || a.positions == 0 || a.experts == 0 || a.depth == 0) return false;
  if (a.positions >= kMost || a.assignments() >= kMost || a.block_m >= kMost || a.depth >= kMost || a.width >= kMost)
    return false;
  if ((a.positions / 32 + a.positions / a.block_m + 1) * (ceil_div(a.width, 64) * a.panels) >= kMost) return false;
  if (!whole_chunks(a.depth, a.dtype) || a.width % 8 != 0 || !rows_fit(a.x, a.x_rows, a.dtype)) return false;
  for (int i = 0; i < a.panels; ++i) {
    const ExpertWeights& w = a.panel[i];
    if (!aligned_to(w.data, 16) || !whole_chunks(w.row_stride, a.dtype) || !whole_chunks(w.expert_stride, a.dtype) ||
        w.row_stride < a.depth || w.expert_stride < (a.experts > 1 ? a.depth : 0) ||
        w.expert_stride >= int64_t{1} << 38)
      return false;
  }
  return a.reduce || rows_fit(a.out.data, a.out_rows, out);
}

// The lowest and the highest tile of a type.
constexpr int edge_tile(DType dtype, bool highest) {
  int best = -1;
  for (int i = 0; i < kMoeTileCount; ++i) {
    const MoeTile& t = kMoeTiles[i];
    if (t.kernel != MoeKernel::kWgmma || !t.takes(dtype)) continue;
    if (best < 0 || (t.block_m > kMoeTiles[best].block_m) == highest) best = i;
  }
  return best;
}

// In the tile that was chosen. Where that is none of these: up to 16 rows of an expert the lowest wastes least, and its
// two blocks on an SM overlap with the next kernel's.
void product(Stream stream, const MoeArgs& a) {
  int tile = a.tile;
  if (tile < 0 || moe_tile(tile).kernel != MoeKernel::kWgmma)
    tile = edge_tile(a.dtype, a.assignments() > 16 * a.experts);
  if (tile >= kMoeTileCount) return moe_added_launch(tile)(stream, a);
  kMoeWgmma[tile][a.dtype == DType::kBF16 ? 0 : a.dtype == DType::kF16 ? 1 : 2](stream, a);
}

}  // namespace

bool moe_wgmma(Stream stream, const MoeArgs& a) {
  const DType out = a.dtype == DType::kE4M3 ? a.out.dtype : a.dtype;
  if (!fits(a, out)) return false;
  if (!a.reduce) {
    product(stream, a);
    return true;
  }
  constexpr int64_t kLeast = 256;  // columns: less would be mostly other launches
  const int64_t fit = columns_of_parts(a, a.parts), columns = fit < a.width ? fit / kLeast * kLeast : fit;
  if (columns == 0) return false;
  sum_of_parts(stream, a, a.parts, columns, [&](const MoeArgs& chunk) { product(stream, chunk); });
  return true;
}

}  // namespace kestrel::cuda
