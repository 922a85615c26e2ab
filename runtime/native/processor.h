// The sets of instructions that this processor has, of those that kernels of ours are compiled for.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace framestep {

#if defined(__x86_64__)

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

inline bool has_avx512f() { return __builtin_cpu_supports("avx512f"); }

// And the sets that every processor with one of the two below has.
inline bool has_avx512() {
    return has_avx512f() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

inline bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

// VNNI of 256 bits, with or without AVX-512. Compilers before GCC 11 cannot ask for it by name.
inline bool has_avx_vnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}

// Whether an instruction sums products of 8 bits to 32; without one, ONNX Runtime's products of INT8 saturate at 16 bits.
inline bool has_exact_int8_products() { return has_avx512_vnni() || has_avx_vnni(); }

inline bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

#else

inline bool has_exact_int8_products() { return true; }

#endif

}  // namespace framestep
