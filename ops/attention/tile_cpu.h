// The two loops in which attention on the CPU spends its time, in registers: c += a b, and a transposing load.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/math.h"

namespace KESTREL_CPU {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16, kWide = 4 * kLanes;  // 6 x 64 of c: 24 of the 32 registers
#elif defined(__AVX2__)
inline constexpr int kLanes = 8, kWide = 2 * kLanes;  // 6 x 16 of c: 12 of the 16 registers
#else
inline constexpr int kLanes = 4, kWide = 2 * kLanes;
#endif
inline constexpr int kTileRows = 6;
inline constexpr int kMostLanes = 16;  // padding that suits every level

// c[r][n] += a[r][0] b[0][n] + a[r][1] b[1][n] + ...: in that order for each element, whatever the tile.
template <int kRows, int kColumns>
void multiply_tile(float* __restrict c, int64_t c_stride, const float* __restrict a, int64_t a_stride,
                   const float* __restrict b, int64_t b_stride, int64_t depth) {
  float sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kColumns; ++n) sum[r][n] = c[r * c_stride + n];
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float scale = a[r * a_stride + k];
#pragma omp simd
      for (int n = 0; n < kColumns; ++n) sum[r][n] = mul_add(scale, b[k * b_stride + n], sum[r][n]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kColumns; ++n) c[r * c_stride + n] = sum[r][n];
}

template <int kRows>
void multiply_rows(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                   int64_t columns, int64_t depth) {
  int64_t n = 0;
  for (; n + kWide <= columns; n += kWide)
    multiply_tile<kRows, kWide>(c + n, c_stride, a, a_stride, b + n, b_stride, depth);
  for (; n < columns; n += kLanes) multiply_tile<kRows, kLanes>(c + n, c_stride, a, a_stride, b + n, b_stride, depth);
}

// c [rows, columns] += a [rows, depth] b [depth, columns]; columns a multiple of kMostLanes.
inline void multiply(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                     int64_t rows, int64_t columns, int64_t depth) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    multiply_rows<kTileRows>(c + r * c_stride, c_stride, a + r * a_stride, a_stride, b, b_stride, columns, depth);
  c += r * c_stride;
  a += r * a_stride;
  switch (rows - r) {
    case 5: return multiply_rows<5>(c, c_stride, a, a_stride, b, b_stride, columns, depth);
    case 4: return multiply_rows<4>(c, c_stride, a, a_stride, b, b_stride, columns, depth);
    case 3: return multiply_rows<3>(c, c_stride, a, a_stride, b, b_stride, columns, depth);
    case 2: return multiply_rows<2>(c, c_stride, a, a_stride, b, b_stride, columns, depth);
    case 1: return multiply_rows<1>(c, c_stride, a, a_stride, b, b_stride, columns, depth);
    default: return;
  }
}

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// a0 b0 a1 b1 ... into *low and *high.
template <int... kIndex>
inline void zip(const Lanes& a, const Lanes& b, Lanes* low, Lanes* high, std::integer_sequence<int, kIndex...>) {
  *low = __builtin_shufflevector(a, b, (kIndex / 2 + kIndex % 2 * kLanes)...);
  *high = __builtin_shufflevector(a, b, (kLanes / 2 + kIndex / 2 + kIndex % 2 * kLanes)...);
}

// out[j][i] = in[i][j]: zipping line i with line i + kLanes / 2 rotates the index bits by one.
inline void transpose(float* __restrict out, int64_t out_stride, const float (&in)[kLanes][kLanes]) {
  Lanes lines[kLanes], zipped[kLanes];
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(&lines[i], in[i], sizeof(Lanes));
  for (int bits = kLanes; bits > 1; bits /= 2) {
    for (int i = 0; i < kLanes / 2; ++i)
      zip(lines[i], lines[i + kLanes / 2], &zipped[2 * i], &zipped[2 * i + 1],
          std::make_integer_sequence<int, kLanes>());
    for (int i = 0; i < kLanes; ++i) lines[i] = zipped[i];
  }
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(out + i * out_stride, &lines[i], sizeof(Lanes));
}

// out[d][j] = row j's element d, for `count` rows (rounded up to whole vectors with copies of the last).
template <class T>
void load_transposed(float* __restrict out, int64_t out_stride, const T* base, const int64_t* offsets, int64_t count,
                     int64_t width) {
  float square[kLanes][kLanes];
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int64_t d = 0; d < width; d += kLanes) {
      if (d + kLanes <= width) {
        for (int i = 0; i < kLanes; ++i) {
          const T* row = base + offsets[std::min(j + i, count - 1)] + d;
          for (int l = 0; l < kLanes; ++l) square[i][l] = to_float(row[l]);
        }
        transpose(out + d * out_stride + j, out_stride, square);
      } else {
        for (int64_t l = d; l < width; ++l)
          for (int i = 0; i < kLanes; ++i)
            out[l * out_stride + j + i] = to_float(base[offsets[std::min(j + i, count - 1)] + l]);
      }
    }
  }
}

}  // namespace KESTREL_CPU
