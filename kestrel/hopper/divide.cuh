// Division of an index by a size known at launch. Below 2^31 it is one multiplication and a shift (Granlund and
// Montgomery, 1994); the 64-bit form serves what is larger.
#pragma once

#include <cstdint>

namespace kestrel {

template <class Index>
class Divider;

template <>
class Divider<uint32_t> {
 public:
  Divider() = default;
  explicit Divider(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while (uint64_t{1} << log_ < divisor_) ++log_;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << (31 + log_)) + divisor_ - 1) / divisor_);
  }
  // quotient and remainder, for index < 2^31
  __device__ __forceinline__ void operator()(uint32_t index, uint32_t* quotient, uint32_t* remainder) const {
    *quotient = __umulhi(index * 2, multiplier_) >> log_;
    *remainder = index - *quotient * divisor_;
  }

 private:
  uint32_t divisor_ = 1, multiplier_ = uint32_t{1} << 31, log_ = 0;
};

template <>
class Divider<int64_t> {
 public:
  Divider() = default;
  explicit Divider(int64_t divisor) : divisor_(divisor) {}
  __device__ __forceinline__ void operator()(int64_t index, int64_t* quotient, int64_t* remainder) const {
    *quotient = index / divisor_;
    *remainder = index - *quotient * divisor_;
  }

 private:
  int64_t divisor_ = 1;
};

inline bool fits_32_bits(int64_t count) { return count < int64_t{1} << 31; }

}  // namespace kestrel
