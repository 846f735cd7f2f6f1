// Fragments of mma.sync straight from global memory: loads that leave their registers alone where there is nothing to
// load (a loop can reload in place, without a branch: with one ptxas moves what it has loaded, and waits for it), the
// transpose of an 8 x 8 fragment, and e4m3 widened to f16, which is exact.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace kestrel {

// ld.global.L1::no_allocate.L2::128B of 16 or 8 bytes, if `some`.
template <int kWords>
__device__ __forceinline__ void load_in_place(uint32_t* words, const char* p, int some) {
  if constexpr (kWords == 4) {
    asm volatile(
        "{\n"
        ".reg .pred some;\n"
        "setp.ne.s32 some, %5, 0;\n"
        "@some ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}\n"
        : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
        : "l"(p), "r"(some));
  } else {
    static_assert(kWords == 2);
    asm volatile(
        "{\n"
        ".reg .pred some;\n"
        "setp.ne.s32 some, %3, 0;\n"
        "@some ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];\n"
        "}\n"
        : "+r"(words[0]), "+r"(words[1])
        : "l"(p), "r"(some));
  }
}

// prefetch.global.L2: a hint, so that it may come before the wait for a predecessor that is still writing there.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// movmatrix.sync.aligned.m8n8.trans.b16: lane l holds (l / 4, 2 (l % 4)) and its neighbour, before and after.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// cvt.rn.f16x2.e4m3x2: the two low and the two high bytes.
__device__ __forceinline__ void widen_e4m3(uint32_t bytes, uint32_t* low, uint32_t* high) {
#if __CUDA_ARCH__ >= 890
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}\n"
      : "=r"(*low), "=r"(*high)
      : "r"(bytes));
#else
  const __half2_raw a = __nv_cvt_fp8x2_to_halfraw2(static_cast<uint16_t>(bytes), __NV_E4M3);
  const __half2_raw b = __nv_cvt_fp8x2_to_halfraw2(static_cast<uint16_t>(bytes >> 16), __NV_E4M3);
  *low = a.x | uint32_t{a.y} << 16;
  *high = b.x | uint32_t{b.y} << 16;
#endif
}

}  // namespace kestrel
