// Fragments of mma.sync straight from global memory: loads that leave their registers alone where there is nothing to
// load (a loop can reload in place, without a branch: with one ptxas moves what it has loaded, and waits for it), the
// transpose of an 8 x 8 fragment.
#pragma once

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

// Zero, by an instruction that the compiler does not know for one: of a plain zero it would make another loop of loads.
__device__ __forceinline__ void clear_in_place(uint32_t& word) { asm volatile("and.b32 %0, %0, 0;" : "+r"(word)); }

// movmatrix.sync.aligned.m8n8.trans.b16: lane l holds (l / 4, 2 (l % 4)) and its neighbour, before and after.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

}  // namespace kestrel
