// The sets of instructions that this processor has, of those that kernels of ours are compiled for.
#pragma once

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

inline bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

#endif

}  // namespace framestep
