#include "kestrel/ffi.h"
#include "ops/tau_tail/tau_tail.h"

KESTREL_EXPORT(tau_tail_apply_into);
