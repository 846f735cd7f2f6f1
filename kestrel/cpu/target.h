// CPU twins are compiled once for each instruction set level, and the level of the machine is chosen at run time.
// A twin's file (<op>_cpu.cpp) opens `namespace KESTREL_CPU`, which the build sets to kestrel::cpu::v1, v3 or v4
// (the psABI's x86-64 levels: SSE2, AVX2 with FMA, AVX-512), one compilation each. Its op declares it by
//   KESTREL_CPU_TWIN(layernorm, void(Tensor out, Tensor x, ...));
// and calls cpu::layernorm(...).
#pragma once

#include <type_traits>

namespace kestrel::cpu {

enum Level { kV1, kV3, kV4 };

Level level();  // KESTREL_CPU_LEVEL=v1|v3 lowers it, for tests

template <class Signature>
struct Twin;

template <class R, class... Args>
struct Twin<R(Args...)> {
  R (*levels[3])(Args...);
  R operator()(Args... args) const { return levels[level()](args...); }
};

}  // namespace kestrel::cpu

#ifdef KESTREL_CPU_LEVELS  // x86-64
#define KESTREL_CPU_TWIN(name, ...)                                        \
  namespace kestrel::cpu {                                                 \
  namespace v1 {                                                           \
  std::type_identity_t<__VA_ARGS__> name;                                  \
  }                                                                        \
  namespace v3 {                                                           \
  std::type_identity_t<__VA_ARGS__> name;                                  \
  }                                                                        \
  namespace v4 {                                                           \
  std::type_identity_t<__VA_ARGS__> name;                                  \
  }                                                                        \
  inline constexpr Twin<__VA_ARGS__> name{{v1::name, v3::name, v4::name}}; \
  }                                                                        \
  static_assert(true)
#else
#define KESTREL_CPU_TWIN(name, ...)                                        \
  namespace kestrel::cpu {                                                 \
  namespace v1 {                                                           \
  std::type_identity_t<__VA_ARGS__> name;                                  \
  }                                                                        \
  inline constexpr Twin<__VA_ARGS__> name{{v1::name, v1::name, v1::name}}; \
  }                                                                        \
  static_assert(true)
#endif
