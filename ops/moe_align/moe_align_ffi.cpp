#include "kestrel/ffi.h"
#include "ops/moe_align/moe_align.h"

KESTREL_EXPORT(moe_align_block_size);
KESTREL_EXPORT(moe_lora_align_block_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_align_workspace_bytes, kestrel::moe_align_workspace_bytes);
