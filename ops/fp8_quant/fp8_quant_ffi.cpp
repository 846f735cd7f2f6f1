#include "kestrel/ffi.h"
#include "ops/fp8_quant/fp8_quant.h"

KESTREL_EXPORT(fp8_quant_row);
KESTREL_EXPORT(fp8_quant_tensor);
KESTREL_EXPORT(fp8_quant_static);
