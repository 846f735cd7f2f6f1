#include "kestrel/ffi.h"
#include "ops/linear/linear.h"

KESTREL_EXPORT(linear);
KESTREL_EXPORT(fused_mlp);
