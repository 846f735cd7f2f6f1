// Rows of activations quantized on their way into shared memory, a row by a warp: bits = e4m3(x / scale),
// scale = max(absmax / 448, 1e-6), as fp8_quant_row has them, to the bit.
#pragma once

#include "ops/fp8_quant/quantize.cuh"

namespace kestrel::cuda {

// A lane's part of a row in 16 bits: eight times 16 bytes.
constexpr int kRowVectors = 8;
constexpr uint32_t kMostRowColumns = kRowVectors * kWarp * 8;
// Bytes from one row to the next in shared memory: warps that read eight rows meet different banks.
constexpr uint32_t row_pitch(uint32_t columns) { return (columns + 15) / 16 * 16 + 16; }

template <class X>
struct RowPart {
  Vec<X, kVec16<X>> vectors[kRowVectors];

  static __device__ __forceinline__ uint32_t column(int v) { return (v * kWarp + threadIdx.x % kWarp) * kVec16<X>; }
  __device__ __forceinline__ void load_from(const X* row, uint32_t columns) {
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      vectors[v] = {};
      if (column(v) < columns) vectors[v] = load<kVec16<X>>(row + column(v));
    }
  }
  // Returns the scale.
  __device__ __forceinline__ float quantize_to(unsigned char* row, uint32_t columns) const {
    const float scale = scale_of<X>(warp_max(absmax(vectors))), reciprocal = reciprocal_of(scale);
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v)
      if (column(v) < columns) store(reinterpret_cast<e4m3*>(row) + column(v), scaled<e4m3>(vectors[v], reciprocal));
    return scale;
  }
};

}  // namespace kestrel::cuda
