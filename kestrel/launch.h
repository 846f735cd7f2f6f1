// The one place where kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "kestrel/arithmetic.h"
#include "kestrel/cuda.h"
#include "kestrel/cuda_check.h"

namespace kestrel {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int blocks_y = 1;
  size_t shared_bytes = 0;
  int cluster = 1;
};

using LaunchConfig = cudaLaunchConfig_t;

// Launches a kernel by its driver handle: 0.3 us less of the caller's time than by its symbol. Where the driver
// declines (a thread without a context), the runtime launches, which makes the context or says what is wrong.
void launch_function(const void* symbol, cudaFunction_t function, const LaunchConfig& config, void** params);
// The handle on the current device, looked up once.
cudaFunction_t function_of(const void* symbol, std::atomic<cudaFunction_t>* cache);

// More than 48 KB of shared memory, with what the kernel itself declares, must be allowed, once for each kernel and
// device.
void allow_shared(const void* symbol, size_t bytes, std::atomic<size_t>* cache);

// Clusters of more than 8 blocks run on GPUs that have room for them; they too must be allowed, once.
void allow_large_cluster(const void* symbol, std::atomic<bool>* cache);

// launch<kernel>(stream, {blocks, threads}, args): always a programmatic dependent launch. The kernel's blocks may be
// placed while its predecessor drains, and the kernel waits itself (pdl.cuh) before it touches what the predecessor
// wrote. Empty kernels of many waves lose by it, but kernels that move data gain at any size: 2960 blocks of activation
// take 10.2 us with it, 10.5 without.
template <auto kKernel, class Args>
void launch(Stream stream, const LaunchShape& shape, const Args& args) {
  static std::atomic<cudaFunction_t> functions[kMaxDevices];
  const auto symbol = reinterpret_cast<const void*>(kKernel);
  if (shape.shared_bytes > 8 * 1024) {  // and up to 40 are declared
    static std::atomic<size_t> allowed[kMaxDevices];
    allow_shared(symbol, shape.shared_bytes, allowed);
  }
  if (shape.cluster > 8) {
    static std::atomic<bool> allowed[kMaxDevices];
    allow_large_cluster(symbol, allowed);
  }
  cudaLaunchAttribute attributes[2];
  LaunchConfig config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.blocks_y));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  if (compute_capability() >= 90) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    if (shape.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    }
  }
  void* params[] = {const_cast<Args*>(&args)};
  launch_function(symbol, function_of(symbol, functions), config, params);
}

}  // namespace kestrel
