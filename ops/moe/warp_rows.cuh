// Rows of activations quantized on their way into shared memory, a row by a warp: bits = e4m3(x / scale),
// scale = max(absmax / 448, 1e-6), as fp8_quant_row has them, to the bit.
#pragma once

#include "kestrel/hopper/vec.cuh"
#include "ops/fp8_quant/absmax.cuh"

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
    uint32_t most = 0;
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      float values[kVec16<X>];
      to_floats(vectors[v], values);
#pragma unroll
      for (const float value : values) {
        const uint32_t magnitude = __float_as_uint(value) & 0x7fffffff;
        most = max(most, magnitude > 0x7f800000 ? 0 : magnitude);
      }
    }
    const float scale = fmaxf(__fdiv_rn(__uint_as_float(warp_max(most)), 448.0f), kSmallestScale);
    const float reciprocal = __frcp_rn(scale);
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      if (column(v) >= columns) continue;
      float values[kVec16<X>];
      to_floats(vectors[v], values);
#pragma unroll
      for (float& value : values) value = __fmul_rn(value, reciprocal);
      store(reinterpret_cast<e4m3*>(row) + column(v), from_floats<e4m3>(values));
    }
    return scale;
  }
};

}  // namespace kestrel::cuda
