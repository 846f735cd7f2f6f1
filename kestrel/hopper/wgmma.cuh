// wgmma: d += a b over a warpgroup, a [64, k16] (e4m3: k32), b [k16, kN], d in fp32; b from shared memory, a from there
// or from registers. Thread 32 w + 4 g + q of the group has of d[i] row 16 w + g + 8 (i / 2 % 2), column
// 8 (i / 4) + 2 q + i % 2; of a in registers, a[r], row 16 w + g + 8 (r % 2), from k 2 q + 8 (r / 2) on two numbers of
// 16 bits, from k 4 q + 16 (r / 2) on four of 8.
// In this order: wgmma_fence(), some wgmma(), wgmma_commit(), wgmma_wait(); from the fence to the end of the wait
// nothing else touches d or a.
#pragma once

#include <cstdint>
#include <type_traits>

#include <kestrel/dtype.h>

namespace kestrel {

// Where an operand lies: a descriptor of the tile at `address` (of the shared window), of rows of kSpan bytes (128 or
// 64), swizzled over as many; groups of 8 rows come after one another.
template <int kSpan>
constexpr uint64_t rows_of() {
  static_assert(kSpan == 128 || kSpan == 64);
  constexpr uint64_t kSwizzle = kSpan == 128 ? 1 : 2, kEightRows = 8 * kSpan;
  return kSwizzle << 62 | kEightRows >> 4 << 32;
}
// K-major: the next k16 (k32 of e4m3) is 32 bytes on, within a row; the next kSpan bytes of k are `rows` * kSpan on.
template <int kSpan = 128>
__device__ __forceinline__ uint64_t k_major(uint32_t address) {
  return rows_of<kSpan>() | uint64_t{0x10000} | (address & 0x3ffff) >> 4;
}
// MN-major, for 16-bit types, with the transposing flag: rows are k, kSpan / 2 columns each; the next columns are
// `panel` bytes on. The next k16 is 16 * kSpan bytes on.
template <int kSpan = 128>
__device__ __forceinline__ uint64_t mn_major(uint32_t address, uint32_t panel) {
  return rows_of<kSpan>() | uint64_t{(panel & 0x3ffff) >> 4} << 16 | (address & 0x3ffff) >> 4;
}
// A descriptor `bytes` further.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }
// With `units` added to its low half: 1 moves the tile by 16 bytes, 1 << 16 the next panel (of k_major: nothing).
__device__ __forceinline__ uint64_t shift(uint64_t descriptor, uint32_t units) {
  return (descriptor & uint64_t{0xffffffff} << 32) | (static_cast<uint32_t>(descriptor) + units);
}

// wgmma.fence: before the first wgmma, and where registers of d or a were written since.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// wgmma.commit_group
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

namespace wgmma_text {

template <class T>
struct Types;
template <>
struct Types<bf16> {
  static constexpr char text[] = "k16.f32.bf16.bf16";
};
template <>
struct Types<f16> {
  static constexpr char text[] = "k16.f32.f16.f16";
};
template <>
struct Types<e4m3> {
  static constexpr char text[] = "k32.f32.e4m3.e4m3";
};

// Whether operands in shared memory are transposed, a before b; e4m3 cannot be and has no flags.
template <bool... kTransposed>
struct Flags {
  static constexpr char text[] = "";
};
template <bool kB>
struct Flags<kB> {
  static constexpr char text[] = {',', kB ? '1' : '0', 0};
};
template <bool kA, bool kB>
struct Flags<kA, kB> {
  static constexpr char text[] = {',', kA ? '1' : '0', ',', kB ? '1' : '0', 0};
};
template <class T, bool... kTransposed>
using FlagsOf = std::conditional_t<dtype_of<T> == DType::kE4M3, Flags<>, Flags<kTransposed...>>;

}  // namespace wgmma_text

// The operands of an asm statement are written out: registers of d by fours, then the numbers of what follows them.
// clang-format off
#define KESTREL_D0 "%0, %1, %2, %3"
#define KESTREL_R0 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define KESTREL_D1 KESTREL_D0 ", %4, %5, %6, %7"
#define KESTREL_R1 KESTREL_R0, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define KESTREL_D2 KESTREL_D1 ", %8, %9, %10, %11"
#define KESTREL_R2 KESTREL_R1, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define KESTREL_D3 KESTREL_D2 ", %12, %13, %14, %15"
#define KESTREL_R3 KESTREL_R2, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define KESTREL_D4 KESTREL_D3 ", %16, %17, %18, %19"
#define KESTREL_R4 KESTREL_R3, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define KESTREL_D5 KESTREL_D4 ", %20, %21, %22, %23"
#define KESTREL_R5 KESTREL_R4, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define KESTREL_D6 KESTREL_D5 ", %24, %25, %26, %27"
#define KESTREL_R6 KESTREL_R5, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define KESTREL_D7 KESTREL_D6 ", %28, %29, %30, %31"
#define KESTREL_R7 KESTREL_R6, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define KESTREL_D8 KESTREL_D7 ", %32, %33, %34, %35"
#define KESTREL_R8 KESTREL_R7, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define KESTREL_D9 KESTREL_D8 ", %36, %37, %38, %39"
#define KESTREL_R9 KESTREL_R8, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define KESTREL_D10 KESTREL_D9 ", %40, %41, %42, %43"
#define KESTREL_R10 KESTREL_R9, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define KESTREL_D11 KESTREL_D10 ", %44, %45, %46, %47"
#define KESTREL_R11 KESTREL_R10, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define KESTREL_D12 KESTREL_D11 ", %48, %49, %50, %51"
#define KESTREL_R12 KESTREL_R11, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define KESTREL_D13 KESTREL_D12 ", %52, %53, %54, %55"
#define KESTREL_R13 KESTREL_R12, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define KESTREL_D14 KESTREL_D13 ", %56, %57, %58, %59"
#define KESTREL_R14 KESTREL_R13, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define KESTREL_D15 KESTREL_D14 ", %60, %61, %62, %63"
#define KESTREL_R15 KESTREL_R14, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define KESTREL_D16 KESTREL_D15 ", %64, %65, %66, %67"
#define KESTREL_R16 KESTREL_R15, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define KESTREL_D17 KESTREL_D16 ", %68, %69, %70, %71"
#define KESTREL_R17 KESTREL_R16, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define KESTREL_D18 KESTREL_D17 ", %72, %73, %74, %75"
#define KESTREL_R18 KESTREL_R17, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define KESTREL_D19 KESTREL_D18 ", %76, %77, %78, %79"
#define KESTREL_R19 KESTREL_R18, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define KESTREL_D20 KESTREL_D19 ", %80, %81, %82, %83"
#define KESTREL_R20 KESTREL_R19, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define KESTREL_D21 KESTREL_D20 ", %84, %85, %86, %87"
#define KESTREL_R21 KESTREL_R20, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define KESTREL_D22 KESTREL_D21 ", %88, %89, %90, %91"
#define KESTREL_R22 KESTREL_R21, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define KESTREL_D23 KESTREL_D22 ", %92, %93, %94, %95"
#define KESTREL_R23 KESTREL_R22, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define KESTREL_D24 KESTREL_D23 ", %96, %97, %98, %99"
#define KESTREL_R24 KESTREL_R23, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define KESTREL_D25 KESTREL_D24 ", %100, %101, %102, %103"
#define KESTREL_R25 KESTREL_R24, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define KESTREL_D26 KESTREL_D25 ", %104, %105, %106, %107"
#define KESTREL_R26 KESTREL_R25, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define KESTREL_D27 KESTREL_D26 ", %108, %109, %110, %111"
#define KESTREL_R27 KESTREL_R26, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define KESTREL_D28 KESTREL_D27 ", %112, %113, %114, %115"
#define KESTREL_R28 KESTREL_R27, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define KESTREL_D29 KESTREL_D28 ", %116, %117, %118, %119"
#define KESTREL_R29 KESTREL_R28, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define KESTREL_D30 KESTREL_D29 ", %120, %121, %122, %123"
#define KESTREL_R30 KESTREL_R29, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define KESTREL_D31 KESTREL_D30 ", %124, %125, %126, %127"
#define KESTREL_R31 KESTREL_R30, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

#define KESTREL_WGMMA_SIZES(X) \
  X(8, 0, 4, 5, 6, 7, 8, 9, 10, 11) \
  X(16, 1, 8, 9, 10, 11, 12, 13, 14, 15) \
  X(24, 2, 12, 13, 14, 15, 16, 17, 18, 19) \
  X(32, 3, 16, 17, 18, 19, 20, 21, 22, 23) \
  X(40, 4, 20, 21, 22, 23, 24, 25, 26, 27) \
  X(48, 5, 24, 25, 26, 27, 28, 29, 30, 31) \
  X(56, 6, 28, 29, 30, 31, 32, 33, 34, 35) \
  X(64, 7, 32, 33, 34, 35, 36, 37, 38, 39) \
  X(72, 8, 36, 37, 38, 39, 40, 41, 42, 43) \
  X(80, 9, 40, 41, 42, 43, 44, 45, 46, 47) \
  X(96, 11, 48, 49, 50, 51, 52, 53, 54, 55) \
  X(112, 13, 56, 57, 58, 59, 60, 61, 62, 63) \
  X(128, 15, 64, 65, 66, 67, 68, 69, 70, 71) \
  X(144, 17, 72, 73, 74, 75, 76, 77, 78, 79) \
  X(160, 19, 80, 81, 82, 83, 84, 85, 86, 87) \
  X(176, 21, 88, 89, 90, 91, 92, 93, 94, 95) \
  X(192, 23, 96, 97, 98, 99, 100, 101, 102, 103) \
  X(256, 31, 128, 129, 130, 131, 132, 133, 134, 135)
// clang-format on

#define KESTREL_WGMMA_SHARED(n, last, a, b, p, types, flags, ...)                                                \
  if constexpr (kN == n)                                                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "%" #types \
                 " {" KESTREL_D##last "}, %" #a ", %" #b ", p, 1, 1%" #flags ";\n}"                              \
                 : KESTREL_R##last                                                                               \
                 : "l"(a_at), "l"(b_at), "r"(static_cast<int>(accumulate)), "C"(Types::text), "C"(Flags::text));
#define KESTREL_WGMMA_REGISTERS(n, last, a0, a1, a2, a3, b, p, types, flags)                                         \
  if constexpr (kN == n)                                                                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "%" #types     \
                 " {" KESTREL_D##last "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1%" #flags ";\n}" \
                 : KESTREL_R##last                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_at), "r"(static_cast<int>(accumulate)),         \
                   "C"(Types::text), "C"(Flags::text));

#define KESTREL_IS_SIZE(n, ...) || kN == n
template <int kN>
constexpr bool is_wgmma_size = false KESTREL_WGMMA_SIZES(KESTREL_IS_SIZE);

// wgmma.mma_async, both operands in shared memory; without `accumulate` d = a b.
template <class T, int kN, bool kTransA = false, bool kTransB = false>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a_at, uint64_t b_at, bool accumulate) {
  static_assert(is_wgmma_size<kN>);
  using Types = wgmma_text::Types<T>;
  using Flags = wgmma_text::FlagsOf<T, kTransA, kTransB>;
  KESTREL_WGMMA_SIZES(KESTREL_WGMMA_SHARED)
}

// a in registers.
template <class T, int kN, bool kTransB = false>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b_at, bool accumulate) {
  static_assert(is_wgmma_size<kN>);
  using Types = wgmma_text::Types<T>;
  using Flags = wgmma_text::FlagsOf<T, kTransB>;
  KESTREL_WGMMA_SIZES(KESTREL_WGMMA_REGISTERS)
}

// setmaxnreg, by a whole warpgroup, in kernels of one block on an SM: registers of each thread, a multiple of 8. No-ops
// where it is not sm_90a.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void leave_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace kestrel
