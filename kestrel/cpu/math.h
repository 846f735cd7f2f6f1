// exp, erf, tanh and their kin as straight-line float code that vectorizes. Coefficients: our own minimax fits
// (Lawson's iteration, weighted for relative error); errors measured over all floats of the range by the tests.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#ifndef KESTREL_CPU
#define KESTREL_CPU kestrel::cpu::v1
#endif

namespace KESTREL_CPU {

// One rounding where the machine has the instruction, two elsewhere (a library call would not vectorize).
inline float mul_add(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Relative error < 6e-7; 0 below -104, inf above 88.8.
inline float exp(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = mul_add(x, 1.44269504f, 12582912.0f);  // the integer part lands in the low mantissa bits
  const float n = shifted - 12582912.0f;
  const float r = mul_add(n, 2.12194440e-4f, mul_add(n, -0.693359375f, x));  // ln 2 in two parts, the first short
  float p = 0.00139506021f;
  p = mul_add(p, r, 0.00836895313f);
  p = mul_add(p, r, 0.0416662060f);
  p = mul_add(p, r, 0.166665182f);
  p = mul_add(p, r, 0.5f);
  p = mul_add(p * r, r, r) + 1.0f;
  // 2^n as two factors: n itself may lie outside the exponents of normal numbers.
  const int32_t exponent = static_cast<int32_t>(std::bit_cast<uint32_t>(shifted) - 0x4b400000u);
  const int32_t half = exponent >> 1;
  const float scale_a = std::bit_cast<float>(static_cast<uint32_t>(half + 127) << 23);
  const float scale_b = std::bit_cast<float>(static_cast<uint32_t>(exponent - half + 127) << 23);
  return p * scale_a * scale_b;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

// The standard normal distribution function, (1 + erf(x / sqrt 2)) / 2. The tail is exp(-x^2/2) times a polynomial in
// 1 / (1 + 0.33 |x|), so it keeps its relative accuracy (about 1e-6) where 1 + erf would cancel.
inline float normal_cdf(float x) {
  const float a = std::fabs(x);
  const float t = 1.0f / mul_add(a, 0.33f, 1.0f);
  float p = -0.0263886005f;
  p = mul_add(p, t, 0.151245549f);
  p = mul_add(p, t, -0.328255117f);
  p = mul_add(p, t, 0.299083859f);
  p = mul_add(p, t, -0.112614520f);
  p = mul_add(p, t, 0.148820698f);
  p = mul_add(p, t, 0.102778636f);
  p = mul_add(p, t, 0.133863643f);
  p = mul_add(p, t, 0.131458610f);
  p = mul_add(p, t, 7.26399003e-6f);
  const float tail = exp(-0.5f * a * a) * p;
  return x > 0.0f ? 1.0f - tail : tail;
}

inline float tanh(float x) {
  const float a = std::fabs(x);
  const float s = x * x;
  float p = -0.00554486550f;
  p = mul_add(p, s, 0.0204870887f);
  p = mul_add(p, s, -0.0536886267f);
  p = mul_add(p, s, 0.133307204f);
  p = mul_add(p, s, -0.333332419f);
  const float small = mul_add(p * s, x, x);
  const float large = std::copysign(1.0f - 2.0f / (1.0f + exp(2.0f * a)), x);
  return a < 0.625f ? small : large;
}

inline float gelu(float x) { return x * normal_cdf(x); }

// x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
inline float gelu_tanh(float x) { return x * sigmoid(1.59576912f * mul_add(0.044715f * x * x, x, x)); }

inline float silu(float x) { return x * sigmoid(x); }

}  // namespace KESTREL_CPU
