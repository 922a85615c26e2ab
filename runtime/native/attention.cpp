#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace framestep {

namespace {

using Four = float __attribute__((vector_size(16)));

namespace baseline {
constexpr int LANES = 4;
inline float sum(Four numbers) { return (numbers[0] + numbers[2]) + (numbers[1] + numbers[3]); }
inline Four sum_of_each(Four a, Four b, Four c, Four d) { return Four{sum(a), sum(b), sum(c), sum(d)}; }
inline Four widened(const int8_t* at) {
    return Four{static_cast<float>(at[0]), static_cast<float>(at[1]), static_cast<float>(at[2]), static_cast<float>(at[3])};
}
#include "attention_rows.inc"
}  // namespace baseline

#if defined(__x86_64__)
// everything in between is compiled for the set, which a processor is asked for before one of its functions is called
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
constexpr int LANES = 8;
inline float sum(__m256 numbers) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps(numbers, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline Four sum_of_each(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}
inline __m256 widened(const int8_t* at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
}
#include "attention_rows.inc"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
namespace avx512 {
constexpr int LANES = 16;
inline __m256 halves(__m512 numbers) {
    const __m256 low = _mm512_maskz_extractf32x8_ps(0xFF, numbers, 0);
    return _mm256_add_ps(low, _mm512_maskz_extractf32x8_ps(0xFF, numbers, 1));
}
inline float sum(__m512 numbers) {
    const __m256 eight = halves(numbers);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline Four sum_of_each(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(halves(a), halves(b)), _mm256_hadd_ps(halves(c), halves(d)));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}
inline __m512 widened(const int8_t* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepi8_epi32(0xFFFF, bytes));
}
#include "attention_rows.inc"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

}  // namespace

const AttentionKernels& attention_with(Simd simd) {
#if defined(__x86_64__)
    if (simd == Simd::avx512) return avx512::kernels;
    if (simd == Simd::avx2) return avx2::kernels;
#else
    (void)simd;
#endif
    return baseline::kernels;
}

}  // namespace framestep
