#include "kestrel/cuda.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <mutex>

#include "kestrel/cuda_check.h"
#include "kestrel/launch.h"

namespace kestrel {
namespace {

thread_local int guarded_device = -1;  // while a DeviceGuard stands: asking the runtime again takes 0.03 us

int current_device() {
  if (guarded_device >= 0) return guarded_device;
  int device;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Attributes do not change: each is asked once for each device.
template <class Query>
int cached(std::array<std::atomic<int>, kMaxDevices>& cache, Query query) {
  const int device = current_device();
  if (device >= kMaxDevices) return query(device);
  int value = cache[device].load(std::memory_order_relaxed);
  if (value == 0) cache[device].store(value = query(device), std::memory_order_relaxed);
  return value;
}

int attribute(cudaDeviceAttr which, int device) {
  int value;
  cuda_check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// The driver's launch, found without linking libcuda.
decltype(&cuLaunchKernelEx) driver_launch() {
  static const auto found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    cuda_check(cudaGetDriverEntryPointByVersion("cuLaunchKernelEx", &entry, 12000, cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion");
    return reinterpret_cast<decltype(&cuLaunchKernelEx)>(entry);
  }();
  return found;
}

}  // namespace

cudaFunction_t function_of(const void* symbol, std::atomic<cudaFunction_t>* cache) {
  const int device = current_device();
  cudaFunction_t function = device < kMaxDevices ? cache[device].load(std::memory_order_relaxed) : nullptr;
  if (!function) {
    cuda_check(cudaGetFuncBySymbol(&function, symbol), "cudaGetFuncBySymbol");
    if (device < kMaxDevices) cache[device].store(function, std::memory_order_relaxed);
  }
  return function;
}

void allow_shared(const void* symbol, size_t bytes, std::atomic<size_t>* cache) {
  const int device = current_device();
  if (device < kMaxDevices && cache[device].load(std::memory_order_acquire) >= bytes) return;
  static std::mutex mutex;  // the limit only grows, also where two threads ask for different sizes
  std::lock_guard lock(mutex);
  if (device < kMaxDevices && cache[device].load(std::memory_order_relaxed) >= bytes) return;
  cuda_check(cudaFuncSetAttribute(symbol, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "cudaFuncSetAttribute");
  if (device < kMaxDevices) cache[device].store(bytes, std::memory_order_release);
}

void allow_large_cluster(const void* symbol, std::atomic<bool>* cache) {
  const int device = current_device();
  if (device < kMaxDevices && cache[device].load(std::memory_order_acquire)) return;
  cuda_check(cudaFuncSetAttribute(symbol, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");
  if (device < kMaxDevices) cache[device].store(true, std::memory_order_release);
}

void launch_function(const void* symbol, cudaFunction_t function, const LaunchConfig& config, void** params) {
  CUlaunchConfig driver{};
  driver.gridDimX = config.gridDim.x;
  driver.gridDimY = config.gridDim.y;
  driver.gridDimZ = config.gridDim.z;
  driver.blockDimX = config.blockDim.x;
  driver.blockDimY = config.blockDim.y;
  driver.blockDimZ = config.blockDim.z;
  driver.sharedMemBytes = static_cast<unsigned>(config.dynamicSmemBytes);
  driver.hStream = config.stream;
  // The runtime's attributes are the driver's under other names.
  static_assert(sizeof(CUlaunchAttribute) == sizeof(cudaLaunchAttribute) &&
                static_cast<int>(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) ==
                    static_cast<int>(cudaLaunchAttributeProgrammaticStreamSerialization) &&
                static_cast<int>(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) ==
                    static_cast<int>(cudaLaunchAttributeClusterDimension));
  driver.attrs = reinterpret_cast<CUlaunchAttribute*>(config.attrs);
  driver.numAttrs = config.numAttrs;
  if (driver_launch() && driver_launch()(&driver, function, params, nullptr) == CUDA_SUCCESS) return;
  cuda_check(cudaLaunchKernelExC(&config, symbol, params), "cudaLaunchKernelExC");
}

DeviceGuard::DeviceGuard(DLDevice device) : previous_(current_device()), switched_(previous_ != device.device_id) {
  if (switched_) cuda_check(cudaSetDevice(device.device_id), "cudaSetDevice");
  guarded_device = device.device_id;
}

DeviceGuard::~DeviceGuard() {
  guarded_device = -1;
  if (switched_) cudaSetDevice(previous_);
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status;
  cuda_check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream.handle), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void copy_to_host(Stream stream, DLDevice device, void* host, const void* source, size_t bytes) {
  DeviceGuard guard(device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  cuda_check(cudaMemcpyAsync(host, source, bytes, cudaMemcpyDeviceToHost, cuda_stream), "cudaMemcpyAsync");
  cuda_check(cudaStreamSynchronize(cuda_stream), "cudaStreamSynchronize");
}

int sm_count() {
  static std::array<std::atomic<int>, kMaxDevices> cache;
  return cached(cache, [](int device) { return attribute(cudaDevAttrMultiProcessorCount, device); });
}

int compute_capability() {
  static std::array<std::atomic<int>, kMaxDevices> cache;
  return cached(cache, [](int device) {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
           attribute(cudaDevAttrComputeCapabilityMinor, device);
  });
}

std::string device_name() {
  int device = 0;
  cudaDeviceProp properties;
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    cudaGetLastError();  // else the next check finds it
    return {};
  }
  return properties.name;
}

}  // namespace kestrel
