#include "kestrel/ffi.h"
#include "ops/rope_and_cache/rope_and_cache.h"

KESTREL_EXPORT(rope_and_cache);
