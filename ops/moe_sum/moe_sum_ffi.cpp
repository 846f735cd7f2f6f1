#include "kestrel/ffi.h"
#include "ops/moe_sum/moe_sum.h"

KESTREL_EXPORT(moe_sum);
