#include "kestrel/cublaslt.h"
#include "kestrel/ffi.h"
#include "ops/linear/linear.h"

KESTREL_EXPORT(linear);
KESTREL_EXPORT(fused_mlp);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_workspace_bytes, kestrel::linear_workspace_bytes);

namespace {

namespace ffi = tvm::ffi;

void set_nvidia_folders(const ffi::String& folders) { kestrel::set_nvidia_folders({folders.data(), folders.size()}); }

// (version, path); a name that is not empty is looked for instead of the usual ones.
ffi::Tuple<int64_t, ffi::String> cublaslt_info(const ffi::String& name) {
  return kestrel::binding::raising([&] {
    const kestrel::CublasLt found = name.empty() ? kestrel::cublaslt() : kestrel::find_cublaslt({name});
    return ffi::Tuple<int64_t, ffi::String>(found.version, ffi::String(found.path));
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_nvidia_folders, set_nvidia_folders);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cublaslt_info, cublaslt_info);
