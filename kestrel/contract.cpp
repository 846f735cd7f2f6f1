#include "kestrel/contract.h"

#include <algorithm>
#include <cstdio>

#include "kestrel/indices.h"

namespace kestrel {
namespace {

std::string name_of(const DLDevice& device) {
  return device.device_type == kDLCPU ? "cpu" : "cuda:" + std::to_string(device.device_id);
}

std::string list(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

std::string shape_of(const Tensor& t) { return list(t.shape, std::min(t.rank, kMaxRank)); }
std::string strides_of(const Tensor& t) { return "strides " + list(t.stride, t.rank) + " for shape " + shape_of(t); }

std::string list(std::initializer_list<DimSpec> dims) {
  std::string text = "[";
  for (const DimSpec& d : dims) {
    if (text.size() > 1) text += ", ";
    text += d.dim && d.dim->size < 0 ? d.dim->name : std::to_string(d.dim ? d.dim->size : d.size);
  }
  return text + "]";
}

bool agrees(const DimSpec& spec, int64_t size) {
  const int64_t expected = spec.dim ? spec.dim->size : spec.size;
  return expected < 0 || expected == size;
}

void set_contiguous(Tensor& t) {
  int64_t running = 1;
  for (int i = std::min(t.rank, kMaxRank) - 1; i >= 0; --i) {
    t.stride[i] = running;
    running *= std::max<int64_t>(t.shape[i], 1);
  }
}

void bind(const DimSpec& spec, int64_t size) {
  if (spec.dim) spec.dim->size = size;
}

}  // namespace

std::string name_of(DType dtype) {
  switch (dtype) {
    case DType::kE4M3: return "float8_e4m3fn";
    case DType::kBF16: return "bfloat16";
    default: break;
  }
  const DLDataType type = to_dlpack(dtype);
  switch (type.code) {
    case kDLBool: return "bool";
    case kDLInt: return "int" + std::to_string(type.bits);
    case kDLUInt: return "uint" + std::to_string(type.bits);
    case kDLFloat: return "float" + std::to_string(type.bits);
    case kDLComplex: return "complex" + std::to_string(type.bits);
    default: return "DLPack type " + std::to_string(type.code) + " of " + std::to_string(type.bits) + " bits";
  }
}

Tensor::Tensor(const DLTensor& t)
    : data(static_cast<char*>(t.data) + t.byte_offset),
      dtype(static_cast<DType>(dtype_code(t.dtype.code, t.dtype.bits))),
      device(t.device),
      rank(t.ndim) {
  if (device.device_type == kDLCUDAHost) device = {kDLCPU, 0};
  if (device.device_type == kDLCUDAManaged) device.device_type = kDLCUDA;
  // Loops of a fixed length: copy_n would call memmove for a few words.
  for (int i = 0; i < kMaxRank; ++i) shape[i] = i < rank ? t.shape[i] : 0;
  if (t.strides && !empty())  // frameworks disagree on the strides of nothing
    for (int i = 0; i < kMaxRank; ++i) stride[i] = i < rank ? t.strides[i] : 0;
  else
    set_contiguous(*this);
}

Tensor::Tensor(void* pointer, DType type, std::initializer_list<int64_t> sizes, DLDevice where)
    : data(pointer), dtype(type), device(where), rank(static_cast<int>(sizes.size())) {
  std::copy_n(sizes.begin(), std::min(rank, kMaxRank), shape);
  set_contiguous(*this);
}

bool Tensor::contiguous() const {
  int64_t running = 1;
  for (int i = rank - 1; i >= 0; --i) {
    if (shape[i] == 0) return true;
    if (shape[i] > 1 && stride[i] != running) return false;
    running *= shape[i];
  }
  return true;
}

Arg& Arg::dtype(std::initializer_list<DType> allowed) {
  for (DType d : allowed)
    if (tensor_.dtype == d) return *this;
  std::string expected;
  for (const DType* d = allowed.begin(); d != allowed.end(); ++d)
    expected += (d == allowed.begin() ? "" : d + 1 == allowed.end() ? " or " : ", ") + name_of(*d);
  contract_.fail(ErrorKind::kTypeError, name_, "be " + expected, name_of(tensor_.dtype));
}

Arg& Arg::rank(int at_least, int at_most) {
  if (tensor_.rank >= at_least && tensor_.rank <= at_most) return *this;
  std::string expected = "have " + std::to_string(at_least);
  if (at_most > at_least) expected += " to " + std::to_string(at_most);
  contract_.fail(ErrorKind::kValueError, name_, expected + (at_most == 1 ? " dimension" : " dimensions"),
                 "shape " + shape_of(tensor_));
}

Arg& Arg::shape(std::initializer_list<DimSpec> expected) {
  bool fits = tensor_.rank == static_cast<int>(expected.size());
  const DimSpec* spec = expected.begin();
  for (int i = 0; fits && i < tensor_.rank; ++i) fits = agrees(spec[i], tensor_.shape[i]);
  if (!fits) contract_.fail(ErrorKind::kValueError, name_, "have shape " + list(expected), shape_of(tensor_));
  for (int i = 0; i < tensor_.rank; ++i) bind(spec[i], tensor_.shape[i]);
  return *this;
}

Arg& Arg::shape_like(const Tensor& other) {
  if (tensor_.rank != other.rank || !std::equal(other.shape, other.shape + other.rank, tensor_.shape))
    contract_.fail(ErrorKind::kValueError, name_, "have shape " + shape_of(other), shape_of(tensor_));
  return *this;
}

Arg& Arg::last(DimSpec spec) {
  rank(1, kMaxRank);
  if (!agrees(spec, tensor_.size(-1)))
    contract_.fail(ErrorKind::kValueError, name_,
                   "have a last dimension of " + std::to_string(spec.dim ? spec.dim->size : spec.size),
                   "shape " + shape_of(tensor_));
  bind(spec, tensor_.size(-1));
  return *this;
}

Arg& Arg::contiguous() {
  if (!tensor_.contiguous()) contract_.fail(ErrorKind::kValueError, name_, "be contiguous", strides_of(tensor_));
  return *this;
}

Arg& Arg::last_contiguous() {
  if (tensor_.rank > 0 && tensor_.size(-1) > 1 && tensor_.stride[tensor_.rank - 1] != 1)
    contract_.fail(ErrorKind::kValueError, name_, "have a contiguous last dimension", strides_of(tensor_));
  return *this;
}

Arg& Arg::rows(Rows* rows) {
  last_contiguous();
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};
  int level = 0;
  for (int i = tensor_.rank - 2; i >= 0; --i) {
    const int64_t size = tensor_.shape[i], stride = tensor_.stride[i];
    if (size == 1) continue;
    if (sizes[level] == 1) {
      strides[level] = stride;
    } else if (stride != strides[level] * sizes[level]) {
      if (++level == 2)
        contract_.fail(ErrorKind::kValueError, name_, "have leading dimensions that fold into two strides",
                       strides_of(tensor_));
      strides[level] = stride;
    }
    sizes[level] *= size;
  }
  *rows = {sizes[0] * sizes[1], sizes[0], strides[0], strides[1]};
  return *this;
}

Arg Contract::in(const char* name, const Tensor& t) {
  if (t.rank > kMaxRank) fail(ErrorKind::kValueError, name, "have at most 6 dimensions", std::to_string(t.rank));
  if (t.device.device_type != kDLCPU && t.device.device_type != kDLCUDA)
    fail(ErrorKind::kValueError, name, "lie on the CPU or on a CUDA device",
         "DLPack device type " + std::to_string(t.device.device_type));
  if (!first_) {
    first_ = name;
    device_ = t.device;
    if (!kHasCuda && !on_cpu())
      fail(ErrorKind::kNotImplementedError, name, "lie on the CPU in this build, which has no CUDA part",
           name_of(t.device));
  } else if (t.device.device_type != device_.device_type || t.device.device_id != device_.device_id) {
    fail(ErrorKind::kValueError, name, "be on " + name_of(device_) + " like " + first_, name_of(t.device));
  }
  if (reinterpret_cast<uintptr_t>(t.data) % std::max<int64_t>(size_of(t.dtype), 1) != 0)
    fail(ErrorKind::kValueError, name, "start at a multiple of its element size", "an unaligned address");
  return Arg(*this, name, t);
}

Arg Contract::out(const char* name, const Tensor& t) {
  Arg arg = in(name, t);
  for (int i = 0; i < t.rank; ++i)
    if (t.shape[i] > 1 && t.stride[i] == 0)
      fail(ErrorKind::kValueError, name, "have an element of its own for each index", strides_of(t));
  return arg;
}

void Contract::require(bool holds, const char* name, const char* expected, double got) {
  if (holds) return;
  char text[32];
  std::snprintf(text, sizeof text, "%g", got);
  fail(ErrorKind::kValueError, name, std::string("be ") + expected, text);
}

void Contract::require(bool holds, const char* name, const char* expected, int64_t got) {
  if (!holds) fail(ErrorKind::kValueError, name, std::string("be ") + expected, std::to_string(got));
}

void Contract::require(bool holds, const char* name, const char* expected, const std::string& got) {
  if (!holds) fail(ErrorKind::kValueError, name, std::string("be ") + expected, got);
}

void Contract::require(bool holds, const char* message) {
  if (!holds) throw Error(ErrorKind::kValueError, std::string(op_) + ": " + message);
}

void Contract::workspace(const Tensor& tensor, int64_t bytes, const char* expected, uintptr_t alignment) {
  out("workspace", tensor).dtype({DType::kU8}).rank(1, 1).contiguous();
  require(tensor.shape[0] >= bytes, "workspace", expected, tensor.shape[0]);
  if (reinterpret_cast<uintptr_t>(tensor.data) % alignment != 0)
    fail(ErrorKind::kValueError, "workspace", "be at a multiple of " + std::to_string(alignment) + " bytes",
         "another address");
}

void Contract::indices(Stream stream, const char* name, const Tensor& tensor, int64_t low, int64_t high,
                       bool skip_negative) {
  const BadIndex bad = find_bad_index(stream, tensor, low, high, skip_negative);
  if (bad.position < 0) return;
  fail(ErrorKind::kValueError, name,
       "lie in [" + std::to_string(low) + ", " + std::to_string(high) + ")" + (skip_negative ? " or be negative" : ""),
       std::to_string(bad.value) + " at index " + std::to_string(bad.position));
}

void Contract::fail(ErrorKind kind, const char* name, const std::string& expected, const std::string& got) const {
  throw Error(kind, std::string(op_) + ": " + name + " must " + expected + ", got " + got);
}

}  // namespace kestrel
