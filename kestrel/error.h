// The one exception of the library. `kind` names the Python exception that the binding raises for it.
#pragma once

#include <stdexcept>
#include <string>

// What the shared library shows: the rest of it is hidden.
#define KESTREL_API __attribute__((visibility("default")))

namespace kestrel {

enum class ErrorKind { kTypeError, kValueError, kNotImplementedError, kRuntimeError };

struct KESTREL_API Error : std::runtime_error {
  Error(ErrorKind error_kind, const std::string& message) : std::runtime_error(message), kind(error_kind) {}
  ErrorKind kind;
};

}  // namespace kestrel
