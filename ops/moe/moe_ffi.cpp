#include "kestrel/ffi.h"
#include "ops/moe/moe.h"

KESTREL_EXPORT(moe_up);
KESTREL_EXPORT(moe_up_fp8);
KESTREL_EXPORT(moe_down);
KESTREL_EXPORT(moe_down_fp8);
