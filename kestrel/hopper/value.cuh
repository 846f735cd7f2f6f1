// A Value<T> as a kernel reads it: given on the host, one for all, or one for each index.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

template <class T>
struct DeviceValue {
  T host;
  const T* data = nullptr;
  int64_t stride = 0;

  DeviceValue(const Value<T>& value) : host(value.host) {
    if (!value.tensor) return;
    data = value.tensor->template ptr<T>();
    if (value.tensor->numel() > 1) stride = value.tensor->stride[0];
  }
  __device__ __forceinline__ T at(int64_t index) const { return data ? data[index * stride] : host; }
};

}  // namespace kestrel
