// sums[row, column] = sum over k of x[row, k] * w[column, k], in fp32: the matrix product that the twins share. Weights
// stay as they are stored, row-major, and are converted on the way into registers; rows of x are converted once.
// The order of a sum depends on dtype and depth alone: k goes by pairs of vectors (load_pair), lane l of the one
// accumulator adds the products of lane l of each vector in turn, and sum_lanes() adds the lanes at the end. So a row
// has the same bits alone, in any batch and on any number of threads.
// One row: bound by reading w. Many: a tile of kTileRows x kColumns accumulators keeps the FMA units busy, the tile's
// part of x stays in L1, a block of w in L2 (93% of the FMA peak at 40 x 3072 x 576 in bf16 with AVX-512).
#pragma once

#include <algorithm>
#include <vector>

#include "kestrel/arithmetic.h"
#include "kestrel/cpu/parallel.h"
#include "kestrel/cpu/vec.h"

namespace KESTREL_CPU {

// Columns of a tile. Not more: rows of w are often 4 KiB apart, which puts all of a tile's into the same set of L1.
inline constexpr int kColumns = 4;
// The rows of x that share one pass over a block of weights: as many as leave registers for kColumns accumulators each.
inline constexpr int kTileRows = kLanes == 16 ? 6 : kLanes == 8 ? 3 : 2;
inline constexpr int kBlockColumns = 128;
inline constexpr int kPairLanes = 2 * kLanes;  // the depth goes by pairs of vectors

// One or two (a gate's) matrices of the same shape.
template <class T>
struct Weights {
  const T* panel[2];
  int64_t stride[2];  // elements between rows
  int64_t columns;
  int64_t depth;
};

// A tile's part of the depth: accumulators come from `partial` unless it is the first part, go back there unless it is
// the last.
template <class T>
struct Slice {
  const T* w;  // [columns][depth]; columns past the last repeat it
  int64_t stride, columns, depth;
  int64_t ahead;   // how far from an element of w lies the one to fetch into cache
  const float* x;  // packed: [steps][rows][kLanes], zeros past the depth
  Floats* partial;
  bool first, last;
};

template <int kRows, class T>
void matmul_tile(float* sums, const Slice<T>& s) {
  const T* column[kColumns];
  for (int n = 0; n < kColumns; ++n) column[n] = s.w + std::min<int64_t>(n, s.columns - 1) * s.stride;
  const float* x = s.x;
  Floats acc[kRows][kColumns] = {};
  if (!s.first) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) acc[m][n] = s.partial[m * kColumns + n];
  }
  const auto add = [&](const FloatsPair(&w)[kColumns]) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Floats row = load(x + m * kLanes);
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) acc[m][n] = mul_add(row, w[n].first, acc[m][n]);
    }
    x += kRows * kLanes;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Floats row = load(x + m * kLanes);
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) acc[m][n] = mul_add(row, w[n].second, acc[m][n]);
    }
    x += kRows * kLanes;
  };
  int64_t k = 0;
  for (; k + kPairLanes <= s.depth; k += kPairLanes) {
    FloatsPair w[kColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) {
      w[n] = load_pair(column[n] + k);
      __builtin_prefetch(column[n] + k + s.ahead);
      if constexpr (sizeof(T) == 4) __builtin_prefetch(column[n] + k + s.ahead + kLanes);
    }
    add(w);
  }
  if (const int64_t rest = s.depth - k) {
    FloatsPair w[kColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) w[n] = load_pair(column[n] + k, rest);
    add(w);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    if (s.last) {
      const Floats4 four = sum_lanes(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
      std::memcpy(sums + m * kBlockColumns, &four, sizeof four);
    } else {
      for (int n = 0; n < kColumns; ++n) s.partial[m * kColumns + n] = acc[m][n];
    }
  }
}

template <int kRows = 1, class T>
void matmul_tile(int64_t rows, float* sums, const Slice<T>& s) {
  if constexpr (kRows < kTileRows)
    if (rows > kRows) return matmul_tile<kRows + 1>(rows, sums, s);
  matmul_tile<kRows>(sums, s);
}

// All of the depth for one tile of rows and one block of columns. Several passes, where a tile of x would overflow L1.
template <class T>
[[gnu::noinline]] void matmul_block(float* sums, const float* x, int64_t rows, const T* w, int64_t stride,
                                    int64_t columns, int64_t depth, int64_t ahead) {
  constexpr int64_t kSliceBytes = 28 << 10;
  const int64_t pairs = ceil_div(depth, kPairLanes);
  const int64_t slices = 1 + pairs * kPairLanes * rows * static_cast<int64_t>(sizeof(float)) / kSliceBytes;
  alignas(64) Floats partial[kBlockColumns / kColumns][kTileRows * kColumns];
  for (int64_t i = 0; i < slices; ++i) {
    const int64_t begin = pairs * i / slices * kPairLanes;
    const int64_t end = std::min(pairs * (i + 1) / slices * kPairLanes, depth);
    for (int64_t n = 0; n < columns; n += kColumns)
      matmul_tile(rows, sums + n,
                  Slice<T>{w + n * stride + begin, stride, columns - n, end - begin, ahead, x + begin * rows,
                           partial[n / kColumns], i == 0, i == slices - 1});
  }
}

// Memory of the calling thread for rows of x, aligned to a vector. Kept: it stays as large as the largest call's.
inline float* packing_memory(int64_t floats) {
  static thread_local std::vector<float> memory;
  memory.resize(std::max(memory.size(), static_cast<size_t>(floats + kLanes)));
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (-start & (sizeof(Floats) - 1)) / sizeof(float);
}

// epilogue(row, column, count, sums, sums of the second panel) for pieces of at most kBlockColumns columns, on all
// threads; it may write to the sums. row_of(row) gives a row of x.
template <int kPanels, class T, class X, class Epilogue>
void matmul(const Weights<T>& w, int64_t rows, X row_of, Epilogue epilogue) {
  const int64_t columns = w.columns, depth = w.depth;
  if (columns == 0) return;
  const int64_t width = ceil_div(depth, kPairLanes) * kPairLanes;
  // Rows are taken in chunks that bound the memory their floats need.
  const int64_t chunk_rows = std::max<int64_t>((int64_t{2} << 20) / std::max<int64_t>(width, 1), 8 * kTileRows);
  float* const packed = packing_memory(std::min(rows, chunk_rows) * width);

  for (int64_t chunk = 0; chunk < rows; chunk += chunk_rows) {
    const int64_t chunk_size = std::min(chunk_rows, rows - chunk);
    const int64_t tiles = ceil_div(chunk_size, kTileRows);
    const auto tile_start = [=](int64_t tile) { return chunk_size * tile / tiles; };

    parallel_for(tiles, 1 + 16384 / (kTileRows * (width + 1)), [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t begin = tile_start(tile), height = tile_start(tile + 1) - begin;
        for (int64_t m = 0; m < height; ++m) {
          const auto* x = row_of(chunk + begin + m);
          float* out = packed + begin * width + m * kLanes;
          int64_t k = 0;
          const auto put = [&](FloatsPair pair) {
            store(out, pair.first);
            store(out + height * kLanes, pair.second);
            out += 2 * height * kLanes;
          };
          for (; k + kPairLanes <= depth; k += kPairLanes) put(load_pair(x + k));
          if (k < depth) put(load_pair(x + k, depth - k));
        }
      }
    });

    // A block of weights fits in half of a small L2; their number suits the threads, and where it is too small for
    // them the tiles are shared out too.
    const int64_t budget =
        (int64_t{256} << 10) / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(kPanels * width, 1);
    const int64_t shares = 4 * thread_count();
    const int64_t least = ceil_div(columns, std::clamp<int64_t>(budget, 16, kBlockColumns));
    const int64_t block = kColumns * ceil_div(columns, kColumns * shares * ceil_div(least, shares));
    const int64_t blocks = ceil_div(columns, block);
    const int64_t groups = std::min(tiles, ceil_div(shares, blocks));
    // The first tile reads w from memory and asks for the rows that come 8 KiB later: by itself the hardware looks
    // ahead along a row only (one row, [49152, 576] in bf16: 2.1 ms -> 0.8 ms). For the others w lies in L2.
    const int64_t row_bytes = std::max<int64_t>(w.stride[0] * static_cast<int64_t>(sizeof(T)), 1);
    const int64_t rows_ahead = (1 + 2048 / row_bytes) * kColumns;
    const int64_t grain = 1 + 65536 * groups / (block * width * kPanels * chunk_size + 1);

    parallel_for(blocks * groups, grain, [&](int64_t first, int64_t last) {
      alignas(64) float sums[kPanels][kTileRows][kBlockColumns];
      for (int64_t task = first; task < last; ++task) {
        const int64_t column = task / groups * block, count = std::min(block, columns - column);
        const int64_t first_tile = tiles * (task % groups) / groups, last_tile = tiles * (task % groups + 1) / groups;
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
          const int64_t begin = tile_start(tile), height = tile_start(tile + 1) - begin;
          for (int panel = 0; panel < kPanels; ++panel) {
            const int64_t stride = depth ? w.stride[panel] : 0;
            matmul_block(sums[panel][0], packed + begin * width, height, w.panel[panel] + column * stride, stride,
                         count, depth, tile == first_tile ? rows_ahead * stride : 0);
          }
          for (int64_t m = 0; m < height; ++m)
            epilogue(chunk + begin + m, column, count, sums[0][m], sums[kPanels - 1][m]);
        }
      }
    });
  }
}

}  // namespace KESTREL_CPU
