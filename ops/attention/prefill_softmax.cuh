// Online softmax (Milakov & Gimelshein 2018) of one thread's part of 64 queries by 64 keys, in powers of two. The
// reference that is subtracted need not be the largest score: it follows only where a weight would pass 2^8, so that
// most tiles need no rescaling (Zadouri et al. 2026, FlashAttention-4) and no maximum across threads, only a vote.
#pragma once

#include "kestrel/hopper/numeric.cuh"
#include "kestrel/hopper/warp.cuh"
#include "ops/attention/prefill_tile.h"

namespace kestrel::cuda {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kMostLog2 = 8.0f;       // a weight may come to 2^8
constexpr float kNoReference = -1e30f;  // below every score, and finite
constexpr int kScores = kTileRows / 2;  // of a thread: two rows, 16 pairs of columns each

// The two rows of a thread: 0 and 8 below its first.
struct Rows2 {
  float reference[2] = {kNoReference, kNoReference};  // log2
  float sum[2] = {0.0f, 0.0f};                        // of 2^(score - reference), over this thread's columns
};

// Scores as they come from the product, to those whose `scale` is positive: softcap, and scales that are not.
struct Transform {
  float softcap, factor;  // softcap > 0: 2 log2(e) scale / softcap, otherwise the scale

  __device__ __forceinline__ void operator()(float (&s)[kScores]) const {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      s[i] *= factor;
      // cap tanh(x / cap) = cap - 2 cap / (e^(2 x / cap) + 1)
      if (softcap > 0.0f) s[i] = fmaf(-2.0f * softcap, fast_reciprocal(fast_exp2(s[i]) + 1.0f), softcap);
    }
  }
};

// Columns outside [first, last) of the thread's rows, counted from its first column, get -inf.
__device__ __forceinline__ void mask_scores(float (&s)[kScores], const int (&first)[2], const int (&last)[2]) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const int row = i / 2 % 2, column = i / 4 * 8 + i % 2;
    if (column < first[row] || column >= last[row]) s[i] = -INFINITY;
  }
}

__device__ __forceinline__ float2 sums_of(const float (&s)[kScores]) {
  float even[2] = {s[0], s[2]}, odd[2] = {s[1], s[3]};
#pragma unroll
  for (int i = 4; i < kScores; i += 4)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      even[r] += s[i + 2 * r];
      odd[r] += s[i + 2 * r + 1];
    }
  return {even[0] + odd[0], even[1] + odd[1]};
}

// Sees to it that no weight will pass 2^8. What was summed before must shrink by `shrink`: by 1 where the reference
// stays, as it does for the neighbours of a row of NaN, which nothing can raise.
__device__ __forceinline__ void raise_reference(const float (&s)[kScores], Rows2& rows, float (&shrink)[2],
                                                float scale) {
  float top[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    shrink[r] = 1.0f;
    top[r] = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
    for (int i = 4; i < kScores; i += 4) top[r] = fmaxf(top[r], fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
  }
  const bool rose = __any_sync(
      ~0u, fmaf(top[0], scale, -rows.reference[0]) > kMostLog2 || fmaf(top[1], scale, -rows.reference[1]) > kMostLog2);
  if (rose) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float t = fmaxf(top[r], shuffle_xor(top[r], 1));
      t = fmaxf(t, shuffle_xor(t, 2)) * scale;
      t = fmaxf(t, rows.reference[r]);
      shrink[r] = fast_exp2(rows.reference[r] - t);
      rows.reference[r] = t;
      rows.sum[r] *= shrink[r];
    }
  }
}

// Scores into weights 2^(score scale - reference). Returns the thread's part of the rows' sums.
template <bool kSum>
__device__ __forceinline__ float2 weigh(float (&s)[kScores], const Rows2& rows, float scale, bool sum) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) s[i] = fast_exp2(fmaf(s[i], scale, -rows.reference[i / 2 % 2]));
  return kSum || sum ? sums_of(s) : float2{0.0f, 0.0f};
}

// The first operand of the product with the values.
template <class T>
__device__ __forceinline__ void pack_weights(uint32_t (&p)[kTileRows / 16][4], const float (&s)[kScores]) {
#pragma unroll
  for (int step = 0; step < kTileRows / 16; ++step)
#pragma unroll
    for (int r = 0; r < 4; ++r) p[step][r] = from_float2<T>(s[8 * step + 2 * r], s[8 * step + 2 * r + 1]);
}

// The largest weight of each row, over this thread's columns, as bits; NaN counts for nothing.
template <class T>
__device__ __forceinline__ uint2 largest_weights(const uint32_t (&p)[kTileRows / 16][4]) {
  using Pair = std::conditional_t<dtype_of<T> == DType::kBF16, __nv_bfloat162, __half2>;
  Pair top[2] = {reinterpret_cast<const Pair&>(p[0][0]), reinterpret_cast<const Pair&>(p[0][1])};
#pragma unroll
  for (int i = 2; i < kTileRows / 4; ++i)
    top[i % 2] = __hmax2(top[i % 2], reinterpret_cast<const Pair&>(p[i / 4][i % 4]));
  return {reinterpret_cast<const uint32_t&>(top[0]), reinterpret_cast<const uint32_t&>(top[1])};
}

// Bits of 16-bit numbers, all of them positive.
template <class T>
struct WeightBits {
  static constexpr uint32_t kLimit = dtype_of<T> == DType::kBF16 ? 0x4380 : 0x5c00;  // 2^8
  // Above, scores are worked out again: infinity is there, or near enough for a sum of weights to come to it.
  static constexpr uint32_t kMost = dtype_of<T> == DType::kBF16 ? 0x7b7f : 0x7bff;  // 2^120, 65504
  static constexpr int kFraction = dtype_of<T> == DType::kBF16 ? 7 : 10, kBias = dtype_of<T> == DType::kBF16 ? 127 : 15;
};
template <class T, uint32_t kBound>
__device__ __forceinline__ bool any_above(uint2 pairs) {
  using Pair = std::conditional_t<dtype_of<T> == DType::kBF16, __nv_bfloat162, __half2>;
  constexpr uint32_t kBounds = kBound << 16 | kBound;
  const Pair top = __hmax2(reinterpret_cast<const Pair&>(pairs.x), reinterpret_cast<const Pair&>(pairs.y));
  return __any_sync(~0u, !__hbleu2(top, reinterpret_cast<const Pair&>(kBounds)));
}

// Weights above 2^8, but none above kMost: brings them, and with `shrink` what was summed before, down by powers of
// two.
template <class T>
__device__ __forceinline__ void lower_weights(uint32_t (&p)[kTileRows / 16][4], uint2 largest, Rows2& rows,
                                              float (&shrink)[2]) {
  using Bits = WeightBits<T>;
  using Pair = std::conditional_t<dtype_of<T> == DType::kBF16, __nv_bfloat162, __half2>;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t pair = r ? largest.y : largest.x;
    uint32_t top = max(pair >> 16, pair & 0xffff);
    top = max(top, __shfl_xor_sync(~0u, top, 1));
    top = max(top, __shfl_xor_sync(~0u, top, 2));
    const int power = top > Bits::kLimit ? static_cast<int>(top >> Bits::kFraction) - Bits::kBias : 0;
    shrink[r] = __uint_as_float(static_cast<uint32_t>(127 - power) << 23);
    rows.reference[r] += static_cast<float>(power);
    rows.sum[r] *= shrink[r];
    const uint32_t factor = from_float2<T>(shrink[r], shrink[r]);
#pragma unroll
    for (int i = r; i < kTileRows / 4; i += 2) {
      const Pair product =
          __hmul2(reinterpret_cast<const Pair&>(p[i / 4][i % 4]), reinterpret_cast<const Pair&>(factor));
      p[i / 4][i % 4] = reinterpret_cast<const uint32_t&>(product);
    }
  }
}

}  // namespace kestrel::cuda
