// Storage types <-> float on the device. Round to nearest even; e4m3 saturates at +-448.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <kestrel/dtype.h>

namespace kestrel {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (dtype_of<T> == DType::kBF16) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else if constexpr (dtype_of<T> == DType::kF16) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else {
    return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)};
  }
}

}  // namespace kestrel
