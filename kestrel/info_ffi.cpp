#include "kestrel/info.h"

#include <tvm/ffi/tvm_ffi.h>

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_level, [] { return tvm::ffi::String(kestrel::cpu_level()); });
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_threads, [] { return kestrel::cpu_threads(); });
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_architectures, [] { return tvm::ffi::String(kestrel::cuda_architectures()); });
