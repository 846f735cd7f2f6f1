// Element types. DType is a DLPack type code in the upper bits and the width in the low byte, so that either
// follows from the other by arithmetic; dispatch() is the one place where a run-time dtype becomes a C++ type.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>
#include <string>

#include <kestrel/error.h>

namespace kestrel {

// Storage types: bits only. CPU twins convert with kestrel/cpu/convert.h, kernels with kestrel/hopper/numeric.cuh.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

constexpr uint32_t dtype_code(uint32_t dlpack_code, uint32_t bits) { return dlpack_code << 8 | bits; }

enum class DType : uint32_t {
  kF32 = dtype_code(kDLFloat, 32),
  kF16 = dtype_code(kDLFloat, 16),
  kBF16 = dtype_code(kDLBfloat, 16),
  kE4M3 = dtype_code(kDLFloat8_e4m3fn, 8),
  kU8 = dtype_code(kDLUInt, 8),
  kI32 = dtype_code(kDLInt, 32),
  kI64 = dtype_code(kDLInt, 64),
};

constexpr int64_t size_of(DType dtype) { return (static_cast<uint32_t>(dtype) & 0xff) / 8; }
constexpr DLDataType to_dlpack(DType dtype) {
  const auto code = static_cast<uint32_t>(dtype);
  return {static_cast<uint8_t>(code >> 8), static_cast<uint8_t>(code & 0xff), 1};
}
KESTREL_API std::string name_of(DType dtype);  // "bfloat16"

template <class T>
inline constexpr DType dtype_of = DType{};
template <>
inline constexpr DType dtype_of<float> = DType::kF32;
template <>
inline constexpr DType dtype_of<f16> = DType::kF16;
template <>
inline constexpr DType dtype_of<bf16> = DType::kBF16;
template <>
inline constexpr DType dtype_of<e4m3> = DType::kE4M3;
template <>
inline constexpr DType dtype_of<uint8_t> = DType::kU8;
template <>
inline constexpr DType dtype_of<int32_t> = DType::kI32;
template <>
inline constexpr DType dtype_of<int64_t> = DType::kI64;

// dispatch<bf16, f16>(x.dtype, [&]<class T>() { ... }): calls the body with the C++ type of `dtype`. The types named
// are those that get compiled; an op's contract has let through no other.
template <class... Types, class Body>
void dispatch(DType dtype, Body&& body) {
  const bool found = ((dtype == dtype_of<Types> ? (body.template operator()<Types>(), true) : false) || ...);
  if (!found) throw Error(ErrorKind::kTypeError, "no kernel is compiled for dtype " + name_of(dtype));
}

}  // namespace kestrel
