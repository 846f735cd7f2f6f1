// What an op's host code needs of the CUDA runtime, without its headers. Defined in builds with CUDA alone.
#pragma once

#include <cstddef>
#include <string>

#include <kestrel/tensor.h>

namespace kestrel {

constexpr int kMaxDevices = 64;

// Makes the tensors' device the current one for the life of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(DLDevice device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
  bool switched_;
};

bool is_capturing(Stream stream);
void copy_to_host(Stream stream, DLDevice device, void* host, const void* source, size_t bytes);  // synchronizes
int sm_count();             // of the current device
int compute_capability();   // of the current device, 90 for 9.0
std::string device_name();  // of the current device, "NVIDIA H200"; empty where there is none

}  // namespace kestrel
