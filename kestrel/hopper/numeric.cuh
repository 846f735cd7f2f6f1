// Storage types <-> float on the device, alone and in pairs (the first of a pair in the low half). Round to nearest
// even; e4m3 saturates at +-448.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <kestrel/dtype.h>

namespace kestrel {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(e4m3 x) {
  return __half2float(__ushort_as_half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3).x));
}

template <class T>
__device__ __forceinline__ float2 to_float2(uint32_t pair) {
  if constexpr (dtype_of<T> == DType::kBF16) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
  } else if constexpr (dtype_of<T> == DType::kE4M3) {  // in the low 16 bits
    return __half22float2(__nv_cvt_fp8x2_to_halfraw2(static_cast<uint16_t>(pair), __NV_E4M3));
  } else {
    static_assert(dtype_of<T> == DType::kF16);
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (dtype_of<T> == DType::kF32) {
    return x;
  } else if constexpr (dtype_of<T> == DType::kBF16) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else if constexpr (dtype_of<T> == DType::kF16) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else {
    return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)};
  }
}

template <class T>
__device__ __forceinline__ auto from_float2(float low, float high) {
  if constexpr (dtype_of<T> == DType::kBF16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else if constexpr (dtype_of<T> == DType::kF16) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    return __nv_cvt_float2_to_fp8x2({low, high}, __NV_SATFINITE, __NV_E4M3);  // 16 bits
  }
}

// cvt.rn.f16x2.e4m3x2, twice: four e4m3, exactly.
__device__ __forceinline__ void widen(uint32_t bits, uint32_t* low, uint32_t* high) {
#if __CUDA_ARCH__ >= 890
  asm("{\n"
      ".reg .b16 l, h;\n"
      "mov.b32 {l, h}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, l;\n"
      "cvt.rn.f16x2.e4m3x2 %1, h;\n"
      "}"
      : "=r"(*low), "=r"(*high)
      : "r"(bits));
#else
  const __half2_raw a = __nv_cvt_fp8x2_to_halfraw2(static_cast<uint16_t>(bits), __NV_E4M3);
  const __half2_raw b = __nv_cvt_fp8x2_to_halfraw2(static_cast<uint16_t>(bits >> 16), __NV_E4M3);
  *low = a.x | uint32_t{a.y} << 16;
  *high = b.x | uint32_t{b.y} << 16;
#endif
}

// 2^x and 1/x by the special function unit: relative error below 2^-22, subnormals flushed.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace kestrel
