// One vector register of floats, as wide as the level has them (GCC's and clang's vector types: + - * work on them),
// for the few loops whose order of operations must be fixed by hand. Loads convert bf16, f16 and e4m3.
#pragma once

#include <cstring>
#include <utility>

#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/math.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace KESTREL_CPU {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef float Floats4 __attribute__((vector_size(16)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const bf16* p) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  Halves v;
  std::memcpy(&v, p, sizeof v);
  return std::bit_cast<Floats>(__builtin_convertvector(v, Words) << 16);
}

// The instruction gives what to_float gives (a signaling NaN comes out quiet), 16 elements at once.
inline Floats load(const f16* p) {
#if defined(__F16C__) && defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p)));
#elif defined(__F16C__) && defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p)));
#else
  float v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return load(v);
#endif
}

// As to_float has it. (g++ 12 widens bytes to 512 bits one by one by itself.)
inline Floats load(const e4m3* p) {
#if defined(__AVX512F__)
  const Words word =
      std::bit_cast<Words>(_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p))));
#elif defined(__AVX2__)
  const Words word = std::bit_cast<Words>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(p))));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  const Words word = __builtin_convertvector(v, Words);
#endif
  const Words magnitude = (word & 0x7f) << 20;
  const Words scaled = std::bit_cast<Words>(std::bit_cast<Floats>(magnitude) * 0x1p120f);
  const Words nan = std::bit_cast<Words>(magnitude == 0x07f00000) & 0x7fc00000;
  return std::bit_cast<Floats>(scaled | nan | (word & 0x80) << 24);
}

// 2 kLanes elements in an order of the dtype's own: the same for every array of it, so products of two arrays match.
struct FloatsPair {
  Floats first, second;
};

template <class T>
FloatsPair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}

// Even elements, then odd ones: one instruction for each vector instead of two.
inline FloatsPair load_pair(const bf16* p) {
  Words v;
  std::memcpy(&v, p, sizeof v);
  return {std::bit_cast<Floats>(v << 16), std::bit_cast<Floats>(v & 0xffff0000)};
}

// The first `count` elements, with zeros in place of the others.
template <class T>
FloatsPair load_pair(const T* p, int64_t count) {
  T part[2 * kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(count) * sizeof(T));
  return load_pair(part);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline Floats mul_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) && defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int i = 0; i < kLanes; ++i) c[i] = mul_add(a[i], b[i], c[i]);
  return c;
#endif
}

// Lanes of a and b by turns, within each 128 bits: kRun = 1: a0 b0 a1 b1, kRun = 2: a0 a1 b0 b1; from lane 2 on where
// kHigh.
template <int kRun, bool kHigh, int... kLane>
Floats interleave(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b,
                                 (kLane / 4 * 4 + (kRun == 1 ? kLane % 4 / 2 : kLane % 2) + 2 * kHigh +
                                  (kRun == 1 ? kLane % 2 : kLane % 4 / 2) * kLanes)...);
}

template <class V>
Floats4 add_halves(V v) {
  if constexpr (sizeof(V) == 64)
    return add_halves(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  else if constexpr (sizeof(V) == 32)
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  else
    return v;
}

// The sums of four vectors' lanes, by one fixed tree: within 128 bits (0 + 2) + (1 + 3), then halves.
inline Floats4 sum_lanes(Floats a, Floats b, Floats c, Floats d) {
  constexpr std::make_integer_sequence<int, kLanes> lanes;
  const Floats ab = interleave<1, false>(a, b, lanes) + interleave<1, true>(a, b, lanes);
  const Floats cd = interleave<1, false>(c, d, lanes) + interleave<1, true>(c, d, lanes);
  const Floats sum = interleave<2, false>(ab, cd, lanes) + interleave<2, true>(ab, cd, lanes);
  return add_halves(sum);
}

}  // namespace KESTREL_CPU
