// bf16, f16 and e4m3 <-> float on the CPU, by bits, round to nearest even: straight-line code, so that a loop over it
// becomes vector code at every instruction set level.
#pragma once

#include <bit>
#include <cstdint>

#include <kestrel/dtype.h>

#ifndef KESTREL_CPU
#define KESTREL_CPU kestrel::cpu::v1
#endif

namespace KESTREL_CPU {

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(f16 x) {
  // The exponent is rebiased by a multiplication, which makes subnormals come out right.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(bits | sign);
}

inline float to_float(e4m3 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80) << 24;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7f) << 20;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p120f;
  const uint32_t bits = magnitude == 0x07f00000 ? 0x7fc00000 : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(bits | sign);
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return {static_cast<uint16_t>(nan ? (bits >> 16 | 0x40) : rounded)};
}

template <>
inline f16 from_float<f16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // Below 2^-14 the value becomes a multiple of 2^-24: adding 0.5 puts those multiples into the last mantissa bits.
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? small : normal;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x477ff000 ? special : finite))};
}

// Saturates at +-448. NaN becomes 0x7f, without its sign, as the GPU's own conversion has it.
template <>
inline e4m3 from_float<e4m3>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 24 & 0x80;
  const uint32_t magnitude = bits & 0x7fffffff;
  // Below 2^-6: multiples of 2^-9; adding 2^14 puts those into the last mantissa bits.
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) - 0x46800000;
  const uint32_t normal = (magnitude - 0x3c000000 + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  const uint32_t finite = magnitude < 0x3c800000 ? small : normal;
  const uint32_t number = sign | (magnitude >= 0x43e00000 ? 0x7e : finite);
  return {static_cast<uint8_t>(magnitude > 0x7f800000 ? 0x7f : number)};
}

}  // namespace KESTREL_CPU
