#include "kestrel/cuda.h"

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "kestrel/cuda_check.h"

namespace kestrel {
namespace {

constexpr int kMaxDevices = 64;

int current_device() {
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

}  // namespace

DeviceGuard::DeviceGuard(DLDevice device) : previous_(current_device()), switched_(previous_ != device.device_id) {
  if (switched_) cuda_check(cudaSetDevice(device.device_id), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() {
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

}  // namespace kestrel
