// Index tensors (slots, positions) on the device, int32 or int64 as their contract says, and the tables that they lead
// into: out of range, no index leads to a wild access.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

struct DeviceIndices {
  const void* data;
  bool wide;  // int64

  explicit DeviceIndices(const Tensor& t) : data(t.data), wide(t.dtype == DType::kI64) {}
  __device__ __forceinline__ int64_t at(int64_t offset) const {
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
  __device__ __forceinline__ const void* address(int64_t offset) const {
    return static_cast<const char*>(data) + (wide ? 8 : 4) * offset;
  }
};

// The same for small calls, whose time is the chain index -> row: two loads of a word and no branch between.
struct IndexWords {
  uint32_t low, high;  // an int32 is its low word

  __device__ __forceinline__ bool below(uint32_t size) const { return low < size && high == 0; }
};
struct FastIndices {
  const uint32_t* data;
  int64_t stride;  // in words
  uint32_t high, mask;

  FastIndices(const Tensor& t, int64_t element_stride)
      : data(t.ptr<uint32_t>()), stride(element_stride), high(0), mask(0) {
    if (t.dtype != DType::kI64) return;
    stride *= 2;
    high = 1;
    mask = ~0u;
  }
  __device__ __forceinline__ const uint32_t* address(uint32_t index) const { return data + index * stride; }
  __device__ __forceinline__ IndexWords at(const uint32_t* address) const { return {address[0], address[high] & mask}; }
};

// Rows of a table. row() is row 0 for an index out of range: its load need not stand behind a branch.
template <class T>
struct Table {
  const T* data;
  int64_t stride, rows;

  explicit Table(const Tensor& t) : data(t.ptr<T>()), stride(t.stride[0]), rows(t.shape[0]) {}
  // Not empty, and small enough for IndexWords: 32 bits for their rows, and for a row's bytes.
  bool fits() const {
    return rows > 0 && rows < int64_t{1} << 31 && stride >= 0 && stride < (int64_t{1} << 32) / int64_t{sizeof(T)};
  }
  __device__ __forceinline__ bool holds(IndexWords index) const { return index.below(static_cast<uint32_t>(rows)); }
  __device__ __forceinline__ bool holds(int64_t index) const { return index >= 0 && index < rows; }
  // From a column of row 0, whose address is known before the index is.
  __device__ __forceinline__ const T* row(const T* column, IndexWords index) const {
    const uint32_t row_bytes = static_cast<uint32_t>(stride) * static_cast<uint32_t>(sizeof(T));
    const uint32_t row = holds(index) ? index.low : 0;
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(column) + uint64_t{row} * row_bytes);
  }
  __device__ __forceinline__ const T* row(int64_t index) const { return data + index * stride; }  // one that it holds
};

}  // namespace kestrel
