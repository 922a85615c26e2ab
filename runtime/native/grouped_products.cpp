#include "grouped_products.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "processor.h"

namespace framestep {
namespace {

inline void put(const char* number, int8_t* to) { std::memcpy(to, number, sizeof *to); }
inline void put(const char* number, float* to) { std::memcpy(to, number, sizeof *to); }

// As the processor rounds.
inline void put(const char* number, uint16_t* to) {
    uint32_t bits;
    std::memcpy(&bits, number, sizeof bits);
    const uint32_t size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) {
        *to = static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays one
    } else if (size < 0x00800000u) {
        *to = static_cast<uint16_t>(bits >> 16 & 0x8000);
    } else {
        *to = static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
    }
}

}  // namespace

template <class Number, int64_t INPUTS>
GroupedMatrix<Number, INPUTS>::GroupedMatrix(std::string_view matrix, int64_t inputs, int64_t outputs, bool transposed,
                                               const Epilogue& epilogue)
    : inputs_(inputs), outputs_(outputs), data_(static_cast<size_t>(groups()) * group_bytes()),
      bias_(static_cast<size_t>(groups() * GROUP)), gelu_(epilogue.gelu) {
    constexpr size_t SIZE = sizeof(Number) == 1 ? 1 : sizeof(float);  // of its numbers there
    const size_t step = group_bytes() / sizeof(Number);
    const int64_t to_next_input = transposed ? 1 : outputs, to_next_output = transposed ? inputs : 1;
    auto* const all = reinterpret_cast<Number*>(data_.data());
    const auto pack = [&](int64_t input, int64_t index) {
        const char* from = matrix.data() + static_cast<size_t>(input * to_next_input + index * GROUP * to_next_output) * SIZE;
        Number* to = all + static_cast<size_t>(index) * step + input / INPUTS * INPUTS * GROUP + input % INPUTS;
        const int64_t count = input < inputs ? std::min(GROUP, outputs - index * GROUP) : 0;
        for (int64_t one = 0; one < count; ++one) put(from + static_cast<size_t>(one * to_next_output) * SIZE, to + INPUTS * one);
        for (int64_t one = count; one < GROUP; ++one) to[INPUTS * one] = 0;
    };
    // along the rows of the matrix, which lie on disk; of the transposed one, along as many as a group has
    const int64_t rows = transposed ? groups() : padded(inputs), columns = transposed ? padded(inputs) : groups();
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < columns; ++column) {
            if (transposed) {
                pack(column, row);
            } else {
                pack(row, column);
            }
        }
    }
    if (epilogue.bias != nullptr) std::copy_n(epilogue.bias, outputs, bias_.begin());
}

template class GroupedMatrix<float, 1>;
template class GroupedMatrix<uint16_t, 2>;
template class GroupedMatrix<int8_t, 4>;

IntegerMatrix::IntegerMatrix(std::string_view matrix, int64_t inputs, int64_t outputs, float input_scale, const float* scales,
                             const Epilogue& epilogue)
    : GroupedMatrix(matrix, inputs, outputs, false, epilogue), input_scale_(input_scale),
      scales_(static_cast<size_t>(groups() * GROUP)), starts_(scales_.size()) {
    std::transform(scales, scales + outputs, scales_.begin(), [&](float scale) { return scale * input_scale; });
    for (int64_t input = 0; input < inputs; ++input) {
        for (int64_t output = 0; output < outputs; ++output) {
            const auto number = static_cast<int8_t>(matrix[static_cast<size_t>(input * outputs + output)]);
            starts_[static_cast<size_t>(output)] -= 128 * number;
        }
    }
}

#if defined(__x86_64__)

// everything in between is compiled for the set, which a processor is asked for before one of its functions is called
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header: its bug 105593
#pragma GCC target("avx512f")
#endif
namespace {
namespace in_float32 {

using Matrix = FloatMatrix;
using Weights = __m512;
using Sums = __m512;
constexpr int64_t INPUTS = 1, LANES = 16, PLACES = 1, ROWS = 8, AT_ONCE = 3;  // 24 of 32 registers hold sums

inline Weights load(const float* at) { return _mm512_load_ps(at); }
inline Weights spread(const float* one) { return _mm512_set1_ps(*one); }
inline Sums begin(const Matrix& matrix, int64_t output) { return _mm512_loadu_ps(matrix.bias() + output); }
inline Sums add(Sums sums, Weights left, Weights right) { return _mm512_fmadd_ps(left, right, sums); }
inline __m512 end(const Matrix&, int64_t, Sums sums, const Matrix::Number*) { return sums; }
inline void store(float* to, __m512 results) { _mm512_storeu_ps(to, results); }

#include "grouped_products.inc"

constexpr ProductKernels<Matrix> kernels = {nullptr, multiply};

}  // namespace in_float32
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")
#endif
namespace {
namespace in_bfloat16 {

using Matrix = Bfloat16Matrix;
using Weights = __m512bh;
using Sums = __m512;
constexpr int64_t INPUTS = 2, LANES = 16, PLACES = 1, ROWS = 8, AT_ONCE = 3;

inline Weights load(const uint16_t* at) { return (Weights)_mm512_load_si512(at); }
inline Weights spread(const uint16_t* two) {
    int32_t both;
    std::memcpy(&both, two, sizeof both);
    return (Weights)_mm512_set1_epi32(both);
}
inline Sums begin(const Matrix& matrix, int64_t output) { return _mm512_loadu_ps(matrix.bias() + output); }
inline Sums add(Sums sums, Weights left, Weights right) { return _mm512_dpbf16_ps(sums, left, right); }
inline __m512 end(const Matrix&, int64_t, Sums sums, const Matrix::Number*) { return sums; }
inline void store(float* to, __m512 results) { _mm512_storeu_ps(to, results); }

#include "grouped_products.inc"

void round(const Matrix& matrix, const float* x, int64_t first, int64_t stop, uint16_t* rows) {
    const int64_t inputs = matrix.inputs(), size = Matrix::padded(inputs);
    for (int64_t row = first; row < stop; ++row) {
        const float* from = x + row * inputs;
        uint16_t* to = rows + row * size;
        for (int64_t input = 0; input < size; input += LANES) {
            const int64_t numbers = inputs - input, kept = size - input;
            const auto mask = static_cast<__mmask16>(numbers >= LANES ? 0xFFFF : (1 << numbers) - 1);
            const auto filled = static_cast<__mmask16>(kept >= LANES ? 0xFFFF : (1 << kept) - 1);
            const __m256bh sixteen = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from + input));
            _mm256_mask_storeu_epi16(to + input, filled, (__m256i)sixteen);
        }
    }
}

constexpr ProductKernels<Matrix> kernels = {round, multiply};

}  // namespace in_bfloat16
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
#endif
namespace {
namespace in_int8_vnni {

using Matrix = IntegerMatrix;
using Weights = __m512i;
using Sums = int32_t __attribute__((vector_size(64)));
constexpr int64_t INPUTS = 4, LANES = 16, PLACES = 1, ROWS = 8, AT_ONCE = 3;

inline Weights load(const int8_t* at) { return _mm512_load_si512(at); }
inline Weights spread(const int8_t* four) {
    int32_t all;
    std::memcpy(&all, four, sizeof all);
    return _mm512_set1_epi32(all);
}
inline Sums begin(const Matrix& matrix, int64_t output) { return (Sums)_mm512_loadu_si512(matrix.starts() + output); }
inline Sums add(Sums sums, Weights rows, Weights weights) { return (Sums)_mm512_dpbusd_epi32((__m512i)sums, rows, weights); }
inline __m512 end(const Matrix& matrix, int64_t output, Sums sums, const int8_t* behind_row) {
    float added;
    std::memcpy(&added, behind_row, sizeof added);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)sums), _mm512_loadu_ps(matrix.scales() + output),
                           _mm512_add_ps(_mm512_loadu_ps(matrix.bias() + output), _mm512_set1_ps(added)));
}
inline void store(float* to, __m512 results) { _mm512_storeu_ps(to, results); }

#include "grouped_products.inc"

// As QuantizeLinear does, and 128 more; but for NaN.
void round(const Matrix& matrix, const float* x, int64_t first, int64_t stop, int8_t* rows) {
    const int64_t inputs = matrix.inputs(), size = Matrix::padded(inputs);
    const __m512 scale = _mm512_set1_ps(matrix.input_scale());
    for (int64_t row = first; row < stop; ++row) {
        const float* from = x + row * inputs;
        int8_t* to = rows + row * Matrix::row_size(inputs);
        __mmask16 nan = 0;
        for (int64_t input = 0; input < size; input += LANES) {
            const int64_t numbers = inputs - input, kept = size - input;
            const auto mask = static_cast<__mmask16>(numbers >= LANES ? 0xFFFF : (1 << numbers) - 1);
            const auto filled = static_cast<__mmask16>(kept >= LANES ? 0xFFFF : (1 << kept) - 1);
            __m512 scaled = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, from + input), scale);
            nan |= _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q);
            scaled = _mm512_min_ps(_mm512_max_ps(scaled, _mm512_set1_ps(-128)), _mm512_set1_ps(127));
            const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(128));
            _mm_mask_storeu_epi8(to + input, filled, _mm512_cvtepi32_epi8(whole));
        }
        const float added = nan == 0 ? 0.0f : NAN;
        std::memcpy(to + size, &added, sizeof added);
    }
}

constexpr ProductKernels<Matrix> kernels = {round, multiply};

}  // namespace in_int8_vnni
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace {
// Integers are widened to 16 bits, for the one product of 8 that there is without VNNI saturates.
namespace in_int8_avx2 {

using Matrix = IntegerMatrix;
using Weights = __m256i;
using Sums = int32_t __attribute__((vector_size(32)));  // of 4 outputs, in two parts each
constexpr int64_t INPUTS = 4, LANES = 4, PLACES = 2, ROWS = 6, AT_ONCE = 2;  // 12 of 16 registers hold sums

inline Weights load(const int8_t* at) {
    return _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
}
inline Weights spread(const int8_t* four) {
    int64_t all;
    std::memcpy(&all, four, sizeof all);
    return _mm256_set1_epi64x(all);
}
inline Sums begin(const Matrix&, int64_t) { return Sums{}; }
inline Sums add(Sums sums, Weights rows, Weights weights) { return sums + (Sums)_mm256_madd_epi16(rows, weights); }
inline __m128 end(const Matrix& matrix, int64_t output, Sums sums, const int8_t* behind_row) {
    float added;
    std::memcpy(&added, behind_row, sizeof added);
    const __m256i whole = _mm256_permute4x64_epi64(_mm256_hadd_epi32((__m256i)sums, (__m256i)sums), 0b1000);
    return _mm_fmadd_ps(_mm_cvtepi32_ps(_mm256_castsi256_si128(whole)), _mm_loadu_ps(matrix.scales() + output),
                        _mm_add_ps(_mm_loadu_ps(matrix.bias() + output), _mm_set1_ps(added)));
}
inline void store(float* to, __m128 results) { _mm_storeu_ps(to, results); }

#include "grouped_products.inc"

// As QuantizeLinear does, but for NaN.
void round(const Matrix& matrix, const float* x, int64_t first, int64_t stop, int8_t* rows) {
    constexpr int64_t EIGHT = 8;
    const int64_t inputs = matrix.inputs(), size = Matrix::padded(inputs);
    const __m256 scale = _mm256_set1_ps(matrix.input_scale());
    for (int64_t row = first; row < stop; ++row) {
        const float* from = x + row * inputs;
        int8_t* to = rows + row * Matrix::row_size(inputs);
        __m256 nan = _mm256_setzero_ps();
        for (int64_t input = 0; input < size; input += EIGHT) {
            float last[EIGHT] = {};
            const bool whole = input + EIGHT <= inputs;
            if (!whole) std::copy(from + input, from + inputs, last);
            __m256 scaled = _mm256_div_ps(_mm256_loadu_ps(whole ? from + input : last), scale);
            nan = _mm256_or_ps(nan, _mm256_cmp_ps(scaled, scaled, _CMP_UNORD_Q));
            scaled = _mm256_min_ps(_mm256_max_ps(scaled, _mm256_set1_ps(-128)), _mm256_set1_ps(127));
            const __m256i integers = _mm256_cvtps_epi32(scaled);
            const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
            std::memcpy(to + PLACES * input, &shorts, static_cast<size_t>(PLACES * std::min(EIGHT, size - input)));
        }
        const float added = _mm256_movemask_ps(nan) == 0 ? 0.0f : NAN;
        std::memcpy(to + PLACES * size, &added, sizeof added);
    }
}

constexpr ProductKernels<Matrix> kernels = {round, multiply};

}  // namespace in_int8_avx2
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const ProductKernels<FloatMatrix>* float_kernels() { return has_avx512f() ? &in_float32::kernels : nullptr; }

const ProductKernels<Bfloat16Matrix>* bfloat16_kernels() { return has_avx512_bf16() ? &in_bfloat16::kernels : nullptr; }

const ProductKernels<IntegerMatrix>* integer_kernels_with(IntegerSimd simd) {
    if (simd == IntegerSimd::avx2) return has_avx2() ? &in_int8_avx2::kernels : nullptr;
    return has_avx512_vnni() ? &in_int8_vnni::kernels : nullptr;
}

const ProductKernels<IntegerMatrix>* integer_kernels() {
    const ProductKernels<IntegerMatrix>* fastest = integer_kernels_with(IntegerSimd::avx512_vnni);
    return fastest == nullptr && !has_avx_vnni() ? integer_kernels_with(IntegerSimd::avx2) : fastest;
}

#else

const ProductKernels<FloatMatrix>* float_kernels() { return nullptr; }

const ProductKernels<Bfloat16Matrix>* bfloat16_kernels() { return nullptr; }

const ProductKernels<IntegerMatrix>* integer_kernels_with(IntegerSimd) { return nullptr; }

const ProductKernels<IntegerMatrix>* integer_kernels() { return nullptr; }

#endif

}  // namespace framestep
