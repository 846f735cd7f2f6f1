#include "kestrel/ffi.h"
#include "ops/activation/activation.h"

KESTREL_EXPORT(gelu_residual);
KESTREL_EXPORT(silu_and_mul);
KESTREL_EXPORT(gelu_and_mul);
KESTREL_EXPORT(gelu_tanh_and_mul);
