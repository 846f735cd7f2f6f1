#include "kestrel/ffi.h"
#include "ops/merge_state/merge_state.h"

KESTREL_EXPORT(merge_state);
