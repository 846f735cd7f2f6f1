#include "kestrel/ffi.h"
#include "ops/kv_cache_write/kv_cache_write.h"

KESTREL_EXPORT(reshape_and_cache_flash);
