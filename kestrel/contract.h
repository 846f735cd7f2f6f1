// The checks of an op, written so that they read as its contract. Each failed check is one line that names op,
// argument, what was expected and what came:
//   rotary_embedding: cos_sin_cache must be float32, got float16
// Checks that pass allocate nothing. All of them stand before the first write.
#pragma once

#include <initializer_list>
#include <string>

#include <kestrel/tensor.h>

namespace kestrel {

#ifdef KESTREL_CUDA
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;
#endif

// A named size: the first shape that mentions it sets it, the others must agree.
struct Dim {
  const char* name;
  int64_t size = -1;
  explicit Dim(const char* dim_name) : name(dim_name) {}
  operator int64_t() const { return size; }
};

// One entry of an expected shape: a Dim or a number.
struct DimSpec {
  Dim* dim = nullptr;
  int64_t size = -1;
  DimSpec(Dim& d) : dim(&d) {}
  DimSpec(int64_t n) : size(n) {}
};

class Contract;

class Arg {
 public:
  Arg& dtype(std::initializer_list<DType> allowed);
  Arg& dtype_like(const Tensor& other) { return dtype({other.dtype}); }
  Arg& rank(int at_least, int at_most);
  Arg& shape(std::initializer_list<DimSpec> expected);
  Arg& shape_like(const Tensor& other);
  Arg& last(DimSpec size);  // the last dimension
  Arg& like(const Tensor& other) { return dtype_like(other).shape_like(other); }
  Arg& contiguous();
  Arg& last_contiguous();  // elements of the last dimension adjacent, the others of any stride
  Arg& rows(Rows* rows);   // last_contiguous, and leading dimensions that fold into Rows

 private:
  friend class Contract;
  Arg(Contract& contract, const char* name, const Tensor& tensor) : contract_(contract), name_(name), tensor_(tensor) {}
  Contract& contract_;
  const char* name_;
  const Tensor& tensor_;
};

class Contract {
 public:
  explicit Contract(const char* op) : op_(op) {}

  Arg in(const char* name, const Tensor& tensor);   // read
  Arg out(const char* name, const Tensor& tensor);  // written: no two indices may share an element

  // "op: argument must be <expected>, got <got>", as a ValueError, where `holds` is false.
  void require(bool holds, const char* name, const char* expected, double got);
  void require(bool holds, const char* name, const char* expected, int64_t got);
  void require(bool holds, const char* name, const char* expected, const std::string& got);
  // For relations between arguments that are no single argument's: "op: <message>".
  void require(bool holds, const char* message);

  // Every index in [low, high), or negative where `skip_negative`; checked on the CPU always, on CUDA where
  // KESTREL_CHECK=1 and no graph is being captured (it copies the indices to the host and synchronizes the stream).
  void indices(Stream stream, const char* name, const Tensor& tensor, int64_t low, int64_t high, bool skip_negative);

  // "workspace": u8 [bytes or more] at a multiple of `alignment` bytes; `expected` says what is long enough.
  void workspace(const Tensor& tensor, int64_t bytes, const char* expected, uintptr_t alignment);

  // After the checks: true where the tensors lie on the CPU.
  bool on_cpu() const { return device_.device_type == kDLCPU; }

  [[noreturn]] void fail(ErrorKind kind, const char* name, const std::string& expected, const std::string& got) const;

 private:
  friend class Arg;
  const char* op_;
  const char* first_ = nullptr;  // the argument that decided the device
  DLDevice device_{kDLCPU, 0};
};

}  // namespace kestrel
