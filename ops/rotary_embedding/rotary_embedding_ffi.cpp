#include "kestrel/ffi.h"
#include "ops/rotary_embedding/rotary_embedding.h"

KESTREL_EXPORT(rotary_embedding);
