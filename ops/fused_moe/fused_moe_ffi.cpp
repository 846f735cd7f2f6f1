#include "kestrel/ffi.h"
#include "ops/fused_moe/fused_moe.h"

KESTREL_EXPORT(fused_moe);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused_moe_workspace_bytes, kestrel::fused_moe_workspace_bytes);
