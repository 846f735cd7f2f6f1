// The main loop of products at few rows, out^T = w x^T: 16 rows of w are the a of mma.sync, 8 rows of x its b.
// A granule is 16 rows x (64 columns for each consumer warp) of w, one stage of a ring in shared memory; each warp
// takes one slab of 64 columns of it. One producer warp fills the ring, before the dependency wait too: weights are all
// it reads. A dot product does not care in which order its terms come, so that a thread's operands are whole 16 bytes
// of w and of x, in the same order of columns: no ldmatrix. Results of the warps are summed once for each tile.
#pragma once

#include "kestrel/hopper/mbarrier.cuh"
#include "kestrel/hopper/mma.cuh"
#include "kestrel/hopper/numeric.cuh"
#include "kestrel/hopper/tma.cuh"
#include "kestrel/hopper/warp.cuh"

namespace kestrel {

constexpr uint32_t kSlabColumns = 64;
constexpr uint32_t kSlabPitch = 128;  // bytes of a slab's row
constexpr uint32_t kTileRows = 16;
constexpr uint32_t kSlabBytes = kTileRows * kSlabPitch;

// A stage is full when its bytes have landed and empty when each consumer warp has arrived. Producer and consumers
// count the granules alike, each in a Ring of its own, and never reset it from tile to tile.
struct Ring {
  uint32_t data, barriers;  // addresses: stages of 1024-aligned data; a full and an empty barrier for each
  uint32_t stages, stage_bytes;
  uint32_t stage = 0, parity = 0;

  __device__ __forceinline__ uint32_t address() const { return data + stage * stage_bytes; }
  __device__ __forceinline__ uint32_t full() const { return barriers + stage * 16; }
  __device__ __forceinline__ uint32_t empty() const { return barriers + stage * 16 + 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  // By a whole warp, when it has read the stage, which may then be filled anew. In program order alone the arrival can
  // overtake loads from shared memory that queue behind loads from global memory (on an H200 stages were refilled under
  // them), so it is made to depend on what was loaded last. gridDim.y is 1, which the compiler does not know.
  __device__ __forceinline__ void release(uint32_t loaded) const {
    const bool here = (loaded & 2 & gridDim.y) == 0;
    __syncwarp();
    if (here & elected()) arrive(empty());
  }
  // By one warp, before it fills the ring; the others see the barriers after a __syncthreads.
  __device__ __forceinline__ void init(uint32_t consumer_warps) const {
    for (uint32_t i = threadIdx.x % kWarp; i < stages; i += kWarp) {
      init_barrier(barriers + i * 16, 1);
      init_barrier(barriers + i * 16 + 8, consumer_warps);
    }
    fence_init_barrier();
    __syncwarp();
  }
};

// Where the thread of row g = lane / 4 and quarter q = lane % 4 finds the chunks 2q and 2q + 1 (of 8 columns) of its
// slab in rows g and g + 8 of a stage. Eight threads that read at once meet 32 different banks either way.
struct WeightLane {
  uint32_t chunk[2], lower;

  // Boxes: the slabs lie one after another, with TMA's swizzle.
  static __device__ __forceinline__ WeightLane in_boxes(uint32_t warp, uint32_t lane) {
    const uint32_t row = lane / 4, chunk = lane % 4 * 2, at = warp * kSlabBytes + row * kSlabPitch;
    return {{at + ((chunk ^ row) << 4), at + (((chunk + 1) ^ row) << 4)}, 8 * kSlabPitch};
  }
  // Rows `pitch` bytes apart, an odd number of 16 bytes.
  static __device__ __forceinline__ WeightLane in_rows(uint32_t warp, uint32_t lane, uint32_t pitch) {
    const uint32_t at = lane / 4 * pitch + warp * kSlabPitch + lane % 4 * 32;
    return {{at, at + 16}, 8 * pitch};
  }
};

struct Weights {
  uint4 upper[2], lower[2];

  Weights() = default;
  __device__ __forceinline__ Weights(uint32_t stage, const WeightLane& lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      upper[h] = load_shared(stage + lane.chunk[h]);
      lower[h] = load_shared(stage + lane.chunk[h] + lane.lower);
    }
  }

  // By a whole warp, once its loads have returned. `other`: what else was loaded from the stage.
  __device__ __forceinline__ void release(const Ring& ring, uint32_t other = 0) const {
    ring.release(lower[0].x | lower[1].x | other);
  }
};

// sums += w x for one chunk of each row and 8 rows of x. Two chains of sums, which may be one. e4m3, of which a slab
// has 128 columns and a chunk 16, goes through f16.
template <class T>
__device__ __forceinline__ void multiply(float (&even)[4], float (&odd)[4], const uint4& upper, const uint4& lower,
                                         const uint4& x) {
  if constexpr (sizeof(T) == 1) {
    const auto four = [](float(&sums)[4], uint32_t upper_bits, uint32_t lower_bits, uint32_t x_bits) {
      uint32_t a[4], b[2];
      widen(upper_bits, &a[0], &a[2]);
      widen(lower_bits, &a[1], &a[3]);
      widen(x_bits, &b[0], &b[1]);
      mma<f16>(sums, a[0], a[1], a[2], a[3], b[0], b[1]);
    };
    four(even, upper.x, lower.x, x.x);
    four(odd, upper.y, lower.y, x.y);
    four(even, upper.z, lower.z, x.z);
    four(odd, upper.w, lower.w, x.w);
  } else {
    mma<T>(even, upper.x, lower.x, upper.y, lower.y, x.x, x.y);
    mma<T>(odd, upper.z, lower.z, upper.w, lower.w, x.z, x.w);
  }
}

// x of e4m3, widened before: it serves several tiles.
__device__ __forceinline__ void widen(const uint4& bits, uint4 (&wide)[2]) {
  widen(bits.x, &wide[0].x, &wide[0].y);
  widen(bits.y, &wide[0].z, &wide[0].w);
  widen(bits.z, &wide[1].x, &wide[1].y);
  widen(bits.w, &wide[1].z, &wide[1].w);
}
__device__ __forceinline__ void multiply(float (&sums)[4], const uint4& upper, const uint4& lower,
                                         const uint4 (&wide)[2]) {
  const auto four = [&](uint32_t upper_bits, uint32_t lower_bits, uint32_t b0, uint32_t b1) {
    uint32_t a[4];
    widen(upper_bits, &a[0], &a[2]);
    widen(lower_bits, &a[1], &a[3]);
    mma<f16>(sums, a[0], a[1], a[2], a[3], b0, b1);
  };
  four(upper.x, lower.x, wide[0].x, wide[0].y);
  four(upper.y, lower.y, wide[0].z, wide[0].w);
  four(upper.z, lower.z, wide[1].x, wide[1].y);
  four(upper.w, lower.w, wide[1].z, wide[1].w);
}

// The same for one slab, of which the thread holds chunks 2q and 2q + 1 of row g.
template <class T>
__device__ __forceinline__ void multiply(float (&even)[4], float (&odd)[4], const Weights& w, const uint4 (&x)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) multiply<T>(even, odd, w.upper[h], w.lower[h], x[h]);
}

// The sums of the warps of one tile, [warp][column][row] in shared memory: 20 rows apart, the writes of a warp meet 32
// different banks.
constexpr uint32_t kPartialPitch = 20;

// What a thread has of 8 columns from `column` on, of which `columns` are kept.
__device__ __forceinline__ void store_partial(float* partial, const float (&sums)[4], uint32_t column, uint32_t columns,
                                              uint32_t lane = threadIdx.x % kWarp) {
  column += lane % 4 * 2;
  float* const to = partial + column * kPartialPitch + lane / 4;
  if (column < columns) {
    to[0] = sums[0];
    to[8] = sums[2];
  }
  if (column + 1 < columns) {
    to[kPartialPitch] = sums[1];
    to[kPartialPitch + 8] = sums[3];
  }
}

// Over the warps, `stride` floats apart; in a fixed order.
template <int kMostWarps>
__device__ __forceinline__ float sum_partial(const float* partial, uint32_t warps, uint32_t stride) {
  float sums[4] = {};
#pragma unroll
  for (int w = 0; w < kMostWarps; ++w)
    if (w < warps) sums[w % 4] += partial[w * stride];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace kestrel
