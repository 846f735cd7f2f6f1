// A non-owning view of an array (what DLPack's DLTensor says, by value), the stream an op runs on, and values that
// may lie on the host or on the device. Everything a caller of the C++ face needs, with the op's own header.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>

#include <kestrel/dtype.h>

namespace kestrel {

constexpr int kMaxRank = 6;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  DLDevice device{kDLCPU, 0};
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements

  Tensor() = default;
  KESTREL_API explicit Tensor(const DLTensor& tensor);
  // Contiguous, row-major.
  KESTREL_API Tensor(void* data, DType dtype, std::initializer_list<int64_t> shape, DLDevice device = {kDLCPU, 0});

  bool on_cpu() const { return device.device_type == kDLCPU; }
  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < rank && i < kMaxRank; ++i) count *= shape[i];
    return count;
  }
  bool empty() const { return numel() == 0; }
  int64_t size(int dim) const { return shape[dim < 0 ? dim + rank : dim]; }
  KESTREL_API bool contiguous() const;

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

// A cudaStream_t (it converts by itself); ignored for tensors on the CPU. Null is the legacy default stream.
struct Stream {
  void* handle = nullptr;
  Stream() = default;
  Stream(void* cuda_stream) : handle(cuda_stream) {}
};

// A number given on the host, or a tensor of one element (or one per head, per sequence: the op says) that holds it,
// so that a captured graph reads the value of the day.
template <class T>
struct Value {
  T host{};
  std::optional<Tensor> tensor;
  Value(T value = T{}) : host(value) {}
  Value(const Tensor& holder) : tensor(holder) {}
};

// The rows of a tensor [..., N] as one or two strided levels: row r starts at element
// (r / inner) * outer_stride + (r % inner) * inner_stride.
struct Rows {
  int64_t count = 0;
  int64_t inner = 1;
  int64_t inner_stride = 0;
  int64_t outer_stride = 0;

  constexpr int64_t offset(int64_t row) const {
    return row < inner ? row * inner_stride : row / inner * outer_stride + row % inner * inner_stride;
  }
  bool uniform() const { return count <= inner; }
};

}  // namespace kestrel
