// What the attention kernels share on the device.
#pragma once

#include "kestrel/hopper/numeric.cuh"

namespace kestrel::cuda {

// Keys [first, last), in 32 bits.
struct Range {
  int first, last;
};

// The sink of a query head, where there are sinks. Args: has sink and sink_dtype.
template <class Args, class Index>
__device__ __forceinline__ float sink_of(const Args& args, Index head) {
  if (args.sink_dtype == DType::kF32) return static_cast<const float*>(args.sink)[head];
  if (args.sink_dtype == DType::kBF16) return to_float(static_cast<const bf16*>(args.sink)[head]);
  return to_float(static_cast<const f16*>(args.sink)[head]);
}

}  // namespace kestrel::cuda
