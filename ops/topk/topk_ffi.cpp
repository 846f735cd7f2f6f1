#include "kestrel/ffi.h"
#include "ops/topk/topk.h"

KESTREL_EXPORT(topk_fwd);
KESTREL_EXPORT(topk_router);
KESTREL_EXPORT(sample_top_k);
