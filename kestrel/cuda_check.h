#pragma once

#include <cuda_runtime.h>

#include <string>

#include <kestrel/error.h>

namespace kestrel {

inline void cuda_check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it: the next call starts clean
  throw Error(ErrorKind::kRuntimeError, std::string(call) + ": " + cudaGetErrorString(status));
}

}  // namespace kestrel
