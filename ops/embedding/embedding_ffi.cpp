#include "kestrel/ffi.h"
#include "ops/embedding/embedding.h"

KESTREL_EXPORT(embedding);
