#include "block_products.h"

#include <algorithm>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "processor.h"

namespace framestep {
namespace {

constexpr size_t LINE = 64;  // bytes
constexpr int64_t GROUP = PackedMatrix::GROUP;

// A number of the matrix, plus what makes it positive.
inline uint8_t shifted(const BlockMatrix& matrix, int64_t input, int64_t output) {
    if (output >= matrix.outputs) return matrix.bits == 8 ? 128 : 8;
    const int64_t place = input * matrix.outputs + output;
    if (matrix.bits == 8) return matrix.integers[place] ^ 0x80;
    return ((matrix.integers[place / 2] >> (place % 2 * 4)) & 15) ^ 8;
}

}  // namespace

PackedMatrix::PackedMatrix(const BlockMatrix& matrix)
    : bits_(matrix.bits), inputs_(matrix.inputs), outputs_(matrix.outputs), block_(matrix.block),
      group_bytes_(static_cast<size_t>(inputs_ / block_) * (GROUP * sizeof(float) + static_cast<size_t>(GROUP * block_ * bits_ / 8))),
      data_(static_cast<size_t>(groups()) * group_bytes_) {
    const int64_t block_bytes = GROUP * block_ * bits_ / 8;
    // along the rows of the matrix, which lie on disk; a group's place is looked up again for each
    const int64_t step = bits_ == 8 ? 4 : 8;
    for (int64_t input = 0; input < inputs_; input += step) {
        const int64_t block = input / block_, inside = input % block_;
        const size_t place = static_cast<size_t>(block) * (GROUP * sizeof(float) + static_cast<size_t>(block_bytes));
        for (int64_t group = 0; group < groups(); ++group) {
            uint8_t* at = data_.data() + static_cast<size_t>(group) * group_bytes_ + place;
            const int64_t first = group * GROUP;
            if (inside == 0) {
                float scales[GROUP] = {};
                const int64_t count = std::min(GROUP, outputs_ - first);
                std::memcpy(scales, matrix.scales + block * outputs_ + first, static_cast<size_t>(count) * sizeof(float));
                std::memcpy(at, scales, sizeof scales);
            }
            at += GROUP * sizeof(float) + static_cast<size_t>(GROUP * inside * bits_ / 8);
            for (int64_t lane = 0; lane < GROUP; ++lane) {
                for (int64_t four = 0; four < 4; ++four) {
                    uint8_t number = shifted(matrix, input + four, first + lane);
                    if (bits_ == 4) number |= static_cast<uint8_t>(shifted(matrix, input + 4 + four, first + lane) << 4);
                    *at++ = number;
                }
            }
        }
    }
    if (matrix.bias != nullptr) {
        bias_.assign(static_cast<size_t>(groups() * GROUP), 0.0f);
        std::copy_n(matrix.bias, outputs_, bias_.begin());
    }
}

#if defined(__x86_64__)

// everything in between is compiled for the set, which a processor is asked for before one of its functions is called
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header: its bug 105593
#pragma GCC target("avx2,fma")
#endif
namespace {
namespace avx2 {

constexpr int32_t OFFSET_OF_EIGHT_BITS = 0;  // what is added to the integers while they are multiplied
constexpr int64_t ROWS = 4;                  // multiplied with a part of the matrix while it is in registers
constexpr int64_t TOGETHER = 1;              // groups of it, likewise

struct Numbers {  // 64 integers
    __m256i low, high;
};
struct Sums {  // of 16 outputs
    __m256i low, high;
};
struct Floats {
    __m256 low, high;
};

inline Numbers load(const uint8_t* at) {
    const auto* lines = reinterpret_cast<const __m256i*>(at);
    return {_mm256_loadu_si256(lines), _mm256_loadu_si256(lines + 1)};
}
inline Numbers low_halves(Numbers numbers) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(numbers.low, mask), _mm256_and_si256(numbers.high, mask)};
}
inline Numbers high_halves(Numbers numbers) {
    return low_halves({_mm256_srli_epi16(numbers.low, 4), _mm256_srli_epi16(numbers.high, 4)});
}
inline Sums all(int32_t number) { return {_mm256_set1_epi32(number), _mm256_set1_epi32(number)}; }
inline Sums plus(Sums a, Sums b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }

template <int BITS>
inline __m256i products(__m256i numbers, __m256i four) {
    // pairs of products fit into 16 bits: 2 * 128 * 127
    const __m256i pairs = BITS == 4 ? _mm256_maddubs_epi16(numbers, four)
                                    : _mm256_maddubs_epi16(_mm256_abs_epi8(numbers), _mm256_sign_epi8(four, numbers));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
template <int BITS>
inline Sums add_products(Sums sums, Numbers numbers, int32_t four) {
    const __m256i inputs = _mm256_set1_epi32(four);
    if (BITS == 8) {
        const __m256i offset = _mm256_set1_epi8(-128);
        numbers = {_mm256_xor_si256(numbers.low, offset), _mm256_xor_si256(numbers.high, offset)};
    }
    return {_mm256_add_epi32(sums.low, products<BITS>(numbers.low, inputs)),
            _mm256_add_epi32(sums.high, products<BITS>(numbers.high, inputs))};
}

inline Floats load_floats(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
inline Floats add_scaled(Floats totals, Sums sums, Floats scales, float scale) {
    const __m256 row = _mm256_set1_ps(scale);
    return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.low), _mm256_mul_ps(scales.low, row), totals.low),
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.high), _mm256_mul_ps(scales.high, row), totals.high)};
}
// Of the sizes of `count` numbers, a multiple of 16: compared by their bits, among which NaN is the largest.
inline float largest(const float* at, int64_t count) {
    const __m256i size = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i most = _mm256_setzero_si256();
    for (int64_t index = 0; index < count; index += 8) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + index));
        most = _mm256_max_epu32(most, _mm256_and_si256(bits, size));
    }
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epu32(four, _mm_unpackhi_epi64(four, four));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 1));
    return _mm_cvtss_f32(_mm_castsi128_ps(four));
}
inline void store(float* at, Floats numbers) {
    _mm256_storeu_ps(at, numbers.low);
    _mm256_storeu_ps(at + 8, numbers.high);
}

#include "block_products.inc"

}  // namespace avx2
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
namespace {
namespace avx512_vnni {

constexpr int32_t OFFSET_OF_EIGHT_BITS = 128;
constexpr int64_t ROWS = 4, TOGETHER = PackedMatrix::TOGETHER;

using Numbers = __m512i;
using Sums = int32_t __attribute__((vector_size(64)));
using Floats = __m512;

inline Numbers load(const uint8_t* at) { return _mm512_loadu_si512(at); }
inline Numbers low_halves(Numbers numbers) { return _mm512_and_si512(numbers, _mm512_set1_epi8(15)); }
inline Numbers high_halves(Numbers numbers) { return low_halves(_mm512_srli_epi16(numbers, 4)); }
inline Sums all(int32_t number) { return (Sums)_mm512_set1_epi32(number); }
inline Sums plus(Sums a, Sums b) { return a + b; }
template <int BITS>
inline Sums add_products(Sums sums, Numbers numbers, int32_t four) {
    return (Sums)_mm512_dpbusd_epi32((__m512i)sums, numbers, _mm512_set1_epi32(four));
}
inline Floats load_floats(const float* at) { return _mm512_loadu_ps(at); }
inline Floats add_scaled(Floats totals, Sums sums, Floats scales, float scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)sums), _mm512_mul_ps(scales, _mm512_set1_ps(scale)), totals);
}
// Of the sizes of `count` numbers, a multiple of 16: compared by their bits, among which NaN is the largest.
inline float largest(const float* at, int64_t count) {
    const __m512i size = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i most = _mm512_setzero_si512();
    for (int64_t index = 0; index < count; index += 16) {
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(at + index), size));
    }
    const uint32_t bits = _mm512_reduce_max_epu32(most);
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}
inline void store(float* at, Floats numbers) { _mm512_storeu_ps(at, numbers); }

#include "block_products.inc"

}  // namespace avx512_vnni
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const BlockKernels* block_kernels_with(BlockSimd simd) {
    if (simd == BlockSimd::avx2) return has_avx2() ? &avx2::kernels : nullptr;
    return has_avx512_vnni() ? &avx512_vnni::kernels : nullptr;
}

#else

const BlockKernels* block_kernels_with(BlockSimd) { return nullptr; }

#endif

const BlockKernels* fastest_block_kernels() {
    const BlockKernels* fastest = block_kernels_with(BlockSimd::avx512_vnni);
    return fastest != nullptr ? fastest : block_kernels_with(BlockSimd::avx2);
}

}  // namespace framestep
