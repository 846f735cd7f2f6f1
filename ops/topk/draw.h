// What a draw is made of, so that every device draws the same token: Philox4x32-10 (Salmon, Moraes, Dror, Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", 2011) and the weights' exponential.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace kestrel {

constexpr std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};
  }
  return counter;
}

// The authors' known answers.
static_assert(philox({}, {}) == std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}) ==
              std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
              std::array<uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

// In [0, 1), a multiple of 2^-24.
constexpr float uniform(int64_t seed, int64_t offset, int64_t row) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const uint64_t counter = static_cast<uint64_t>(offset) + static_cast<uint64_t>(row);
  const auto words = philox({static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0},
                            {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)});
  return static_cast<float>(words[0] >> 8) * 0x1p-24f;
}

// exp(x) for x <= 0, relative error < 6e-7; 0 below -87; NaN stays NaN. Multiplications and additions that round one by
// one, in this order, are the definition: a kernel writes __fmul_rn and __fadd_rn.
constexpr float exp_weight(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // the integer part lands in the low mantissa bits
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first product exact
  float p = 0.00139506021f;
  p = p * r + 0.00836895313f;
  p = p * r + 0.0416662060f;
  p = p * r + 0.166665182f;
  p = p * r + 0.5f;
  p = (p * r * r + r) + 1.0f;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - 0x4b400000u;
  const float result = p * std::bit_cast<float>((exponent + 127) << 23);
  return x < -87.0f ? 0.0f : result;
}

}  // namespace kestrel
