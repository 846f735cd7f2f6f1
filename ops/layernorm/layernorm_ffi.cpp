#include "kestrel/ffi.h"
#include "ops/layernorm/layernorm.h"

KESTREL_EXPORT(layernorm);
KESTREL_EXPORT(layernorm_reload);
