// What this build holds and what it chose for this machine.
#pragma once

#include <kestrel/error.h>

namespace kestrel {

KESTREL_API const char* cpu_level();           // the instruction set of the CPU twins: "AVX-512"
KESTREL_API int cpu_threads();                 // the threads they use
KESTREL_API const char* cuda_architectures();  // "80 90a"; empty in a build without CUDA kernels

}  // namespace kestrel
