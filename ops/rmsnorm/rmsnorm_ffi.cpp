#include "kestrel/ffi.h"
#include "ops/rmsnorm/rmsnorm.h"

KESTREL_EXPORT(rmsnorm);
