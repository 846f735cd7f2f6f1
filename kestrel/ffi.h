// The only header that knows tvm-ffi. KESTREL_EXPORT(op) binds a C++ function under its own name; the Python call takes
// its arguments in order, less the stream, which is the caller's current one on the device of the first tensor.
//   Tensor | std::optional<Tensor>   an array, None            bool, int64_t, float   as they are
//   Value<T>                         a number or an array      std::string_view       str
//   std::optional<T>                 T or None
#pragma once

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <kestrel/tensor.h>

namespace kestrel::binding {

namespace ffi = tvm::ffi;

template <class T>
struct Argument {  // numbers
  using From = std::conditional_t<std::is_same_v<T, float>, double, T>;
  static T convert(From value) { return static_cast<T>(value); }
};

template <>
struct Argument<Tensor> {
  using From = DLTensor*;
  static Tensor convert(const DLTensor* tensor) { return Tensor(*tensor); }
};

template <>
struct Argument<std::optional<Tensor>> {
  using From = ffi::Optional<DLTensor*>;
  static std::optional<Tensor> convert(const From& tensor) {
    if (!tensor.has_value()) return std::nullopt;
    return Tensor(**tensor);
  }
};

template <class T>
struct Argument<Value<T>> {
  using From = ffi::AnyView;
  static Value<T> convert(const ffi::AnyView& any) {
    if (auto tensor = any.try_cast<DLTensor*>()) return Value<T>(Tensor(**tensor));
    return Value<T>(static_cast<T>(any.cast<std::conditional_t<std::is_floating_point_v<T>, double, int64_t>>()));
  }
};

template <class T>
struct Argument<std::optional<T>> {  // numbers and Values
  using From = ffi::AnyView;
  static std::optional<T> convert(const ffi::AnyView& any) {
    if (any.type_index() == ffi::TypeIndex::kTVMFFINone) return std::nullopt;
    if constexpr (std::is_same_v<typename Argument<T>::From, ffi::AnyView>)
      return Argument<T>::convert(any);
    else
      return Argument<T>::convert(any.cast<typename Argument<T>::From>());
  }
};

template <>
struct Argument<std::string_view> {
  using From = ffi::String;
  static std::string_view convert(const ffi::String& text) { return {text.data(), text.size()}; }
};

// The first array that lies on a GPU says which.
inline void find_gpu(DLTensor* tensor, int* gpu) {
  const DLDeviceType type = tensor->device.device_type;
  if (*gpu < 0 && type != kDLCPU && type != kDLCUDAHost) *gpu = tensor->device.device_id;
}
inline void find_gpu(const ffi::AnyView& any, int* gpu) {
  if (auto tensor = any.try_cast<DLTensor*>()) find_gpu(*tensor, gpu);
}
inline void find_gpu(const ffi::Optional<DLTensor*>& tensor, int* gpu) {
  if (tensor.has_value()) find_gpu(*tensor, gpu);
}
template <class T>
void find_gpu(const T&, int*) {}

inline const char* python_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kTypeError: return "TypeError";
    case ErrorKind::kValueError: return "ValueError";
    case ErrorKind::kNotImplementedError: return "NotImplementedError";
    case ErrorKind::kRuntimeError: break;
  }
  return "RuntimeError";
}

// Calls f; an Error of the library becomes the Python exception it names.
template <class F>
decltype(auto) raising(F&& f) {
  try {
    return f();
  } catch (const Error& error) {
    throw ffi::Error(python_name(error.kind), error.what(), "");
  }
}

// An argument whose type its conversion refuses is told by its number, as tvm-ffi tells of those that it refuses
// itself.
template <class T, size_t kNumber>
T converted(const typename Argument<T>::From& from) {
  try {
    return Argument<T>::convert(from);
  } catch (const ffi::Error& error) {
    throw ffi::Error(error.kind(), "argument #" + std::to_string(kNumber) + ": " + std::string(error.message()), "");
  }
}

template <class... Args>
auto bind(void (*op)(Stream, Args...)) {
  return [op](typename Argument<Args>::From... from) {
    int gpu = -1;
    (find_gpu(from, &gpu), ...);
    const Stream stream = gpu < 0 ? nullptr : TVMFFIEnvGetStream(kDLCUDA, gpu);
    raising([&] {
      [&]<size_t... kNumbers>(std::index_sequence<kNumbers...>) { op(stream, converted<Args, kNumbers>(from)...); }
      (std::index_sequence_for<Args...>{});
    });
  };
}

// The types of an op's arguments as torch.library writes them, in order; "value" is a number or a tensor.
template <class T>
inline constexpr const char* kTypeName = nullptr;
template <>
inline constexpr const char* kTypeName<Tensor> = "Tensor";
template <>
inline constexpr const char* kTypeName<bool> = "bool";
template <>
inline constexpr const char* kTypeName<int64_t> = "int";
template <>
inline constexpr const char* kTypeName<float> = "float";
template <>
inline constexpr const char* kTypeName<std::string_view> = "str";
template <>
inline constexpr const char* kTypeName<Value<float>> = "value float";
template <>
inline constexpr const char* kTypeName<Value<int64_t>> = "value int";
template <>
inline constexpr const char* kTypeName<std::optional<Tensor>> = "Tensor?";
template <>
inline constexpr const char* kTypeName<std::optional<int64_t>> = "int?";
template <>
inline constexpr const char* kTypeName<std::optional<float>> = "float?";
template <class T>
inline constexpr const char* kTypeName<std::optional<Value<T>>> = kTypeName<Value<T>>;

template <class... Args>
ffi::String types_of(void (*)(Stream, Args...)) {
  std::string names;
  ((names += names.empty() ? "" : ",", names += kTypeName<Args>), ...);
  return names;
}

}  // namespace kestrel::binding

#define KESTREL_EXPORT_AS(name, op)                                              \
  TVM_FFI_DLL_EXPORT_TYPED_FUNC(name, ::kestrel::binding::bind(&::kestrel::op)); \
  TVM_FFI_DLL_EXPORT_TYPED_FUNC(name##_types, [] { return ::kestrel::binding::types_of(&::kestrel::op); })
#define KESTREL_EXPORT(op) KESTREL_EXPORT_AS(op, op)
