#include "kestrel/info.h"

#include "kestrel/cpu/parallel.h"
#include "kestrel/cpu/target.h"

namespace kestrel {

const char* cpu_level() {
  switch (cpu::level()) {
    case cpu::kV4: return "AVX-512";
    case cpu::kV3: return "AVX2";
    case cpu::kV1: break;
  }
#ifdef KESTREL_CPU_LEVELS
  return "SSE2";
#else
  return "baseline";
#endif
}

int cpu_threads() { return cpu::thread_count(); }

const char* cuda_architectures() { return KESTREL_CUDA_ARCHITECTURES; }

}  // namespace kestrel
