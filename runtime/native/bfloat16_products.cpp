#include "bfloat16_products.h"

#include <algorithm>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace framestep {
namespace {

constexpr int64_t GROUP = Bfloat16Matrix::GROUP;

// As the processor rounds.
inline uint16_t rounded(const char* number) {
    uint32_t bits;
    std::memcpy(&bits, number, sizeof bits);
    const uint32_t size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays one
    if (size < 0x00800000u) return static_cast<uint16_t>(bits >> 16 & 0x8000);
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

}  // namespace

Bfloat16Matrix::Bfloat16Matrix(std::string_view matrix, int64_t inputs, int64_t outputs, const float* bias)
    : inputs_(inputs), outputs_(outputs), data_(static_cast<size_t>(groups()) * group_bytes()),
      bias_(static_cast<size_t>(groups() * GROUP)) {
    // along the rows of the matrix, which lie on disk
    const size_t step = group_bytes() / sizeof(uint16_t);
    auto* const all = reinterpret_cast<uint16_t*>(data_.data());
    for (int64_t input = 0; input < even(inputs); ++input) {
        const char* row = matrix.data() + static_cast<size_t>(input * outputs) * sizeof(float);
        for (int64_t index = 0; index < groups(); ++index) {
            uint16_t* to = all + static_cast<size_t>(index) * step + input / 2 * 2 * GROUP + input % 2;
            const int64_t count = input < inputs ? std::min(GROUP, outputs - index * GROUP) : 0;
            for (int64_t one = 0; one < count; ++one) to[2 * one] = rounded(row + (index * GROUP + one) * sizeof(float));
            for (int64_t one = count; one < GROUP; ++one) to[2 * one] = 0;
        }
    }
    if (bias != nullptr) std::copy_n(bias, outputs, bias_.begin());
}

#if defined(__x86_64__)

// everything in between is compiled for the set, which a processor is asked for before one of its functions is called
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header: its bug 105593
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")
#endif
namespace {

constexpr int64_t LANES = 16, PARTS = GROUP / LANES;
constexpr int64_t ROWS = 8;  // with a group, 24 of 32 registers hold sums: one for each product on its way, and more

template <int COUNT>
void multiply_rows(const Bfloat16Matrix& matrix, const uint16_t* rows, int64_t group, float* y) {
    const int64_t size = Bfloat16Matrix::even(matrix.inputs()), outputs = matrix.outputs(), first = group * GROUP;
    const uint16_t* at = matrix.group(group);
    __m512 sums[COUNT][PARTS];
    for (int part = 0; part < PARTS; ++part) {
        const __m512 bias = _mm512_loadu_ps(matrix.bias() + first + part * LANES);
        for (int row = 0; row < COUNT; ++row) sums[row][part] = bias;
    }
    for (int64_t input = 0; input < size; input += 2, at += 2 * GROUP) {
        __m512bh weights[PARTS];
        for (int part = 0; part < PARTS; ++part) {
            weights[part] = (__m512bh)_mm512_load_si512(at + 2 * part * LANES);
        }
        for (int row = 0; row < COUNT; ++row) {
            int32_t two;
            std::memcpy(&two, rows + row * size + input, sizeof two);
            const auto both = (__m512bh)_mm512_set1_epi32(two);
            for (int part = 0; part < PARTS; ++part) {
                sums[row][part] = _mm512_dpbf16_ps(sums[row][part], both, weights[part]);
            }
        }
    }
    for (int row = 0; row < COUNT; ++row) {
        float whole[GROUP];
        float* to = y + row * outputs + first;
        const bool fits = outputs - first >= GROUP;
        for (int part = 0; part < PARTS; ++part) _mm512_storeu_ps((fits ? to : whole) + part * LANES, sums[row][part]);
        if (!fits) std::copy_n(whole, outputs - first, to);
    }
}

void multiply(const Bfloat16Matrix& matrix, const uint16_t* rows, int64_t count, int64_t first, int64_t stop, float* y) {
    const int64_t size = Bfloat16Matrix::even(matrix.inputs()), outputs = matrix.outputs();
    for (int64_t group = first; group < stop; ++group) {
        int64_t row = 0;
        for (; row + ROWS <= count; row += ROWS) multiply_rows<ROWS>(matrix, rows + row * size, group, y + row * outputs);
        for (; row + 4 <= count; row += 4) multiply_rows<4>(matrix, rows + row * size, group, y + row * outputs);
        for (; row < count; ++row) multiply_rows<1>(matrix, rows + row * size, group, y + row * outputs);
    }
}

void round(const float* x, int64_t inputs, int64_t first, int64_t stop, uint16_t* rows) {
    const int64_t size = Bfloat16Matrix::even(inputs);
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

constexpr Bfloat16Kernels kernels = {round, multiply};

}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Bfloat16Kernels* bfloat16_kernels() {
    const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
    return has ? &kernels : nullptr;
}

#else

const Bfloat16Kernels* bfloat16_kernels() { return nullptr; }

#endif

}  // namespace framestep
