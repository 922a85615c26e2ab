#include "block_products.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace framestep {
namespace {

constexpr size_t LINE = 64;              // bytes
constexpr size_t HUGE_PAGE = 2u << 20;  // bytes
constexpr int64_t GROUP = PackedMatrix::GROUP;

// A number of the matrix, plus what makes it positive.
inline uint8_t shifted(const BlockMatrix& matrix, int64_t input, int64_t output) {
    if (output >= matrix.outputs) return matrix.bits == 8 ? 128 : 8;
    const int64_t place = input * matrix.outputs + output;
    if (matrix.bits == 8) return matrix.integers[place] ^ 0x80;
    return ((matrix.integers[place / 2] >> (place % 2 * 4)) & 15) ^ 8;
}

}  // namespace

void PackedMatrix::Free::operator()(uint8_t* data) const { std::free(data); }

PackedMatrix::PackedMatrix(const BlockMatrix& matrix)
    : bits_(matrix.bits), inputs_(matrix.inputs), outputs_(matrix.outputs), block_(matrix.block) {
    const int64_t blocks = inputs_ / block_, block_bytes = GROUP * block_ * bits_ / 8;
    group_bytes_ = static_cast<size_t>(blocks) * (GROUP * sizeof(float) + static_cast<size_t>(block_bytes));
    const size_t bytes = static_cast<size_t>(groups()) * group_bytes_;
    const size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : LINE;
    data_.reset(static_cast<uint8_t*>(std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)));
    if (data_ == nullptr) throw std::bad_alloc();
    if (alignment == HUGE_PAGE) madvise(data_.get(), bytes, MADV_HUGEPAGE);  // a wish

    // along the rows of the matrix, which lie on disk; a group's place is looked up again for each
    const int64_t step = bits_ == 8 ? 4 : 8;
    for (int64_t input = 0; input < inputs_; input += step) {
        const int64_t block = input / block_, inside = input % block_;
        const size_t place = static_cast<size_t>(block) * (GROUP * sizeof(float) + static_cast<size_t>(block_bytes));
        for (int64_t group = 0; group < groups(); ++group) {
            uint8_t* at = data_.get() + static_cast<size_t>(group) * group_bytes_ + place;
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

bool multiplies_blocks() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

// everything in between is compiled for the set, which a processor is asked for before one of its functions is called
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header: its bug 105593
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
namespace {

constexpr int64_t ROWS = 8;  // multiplied with a part of the matrix while it is in a register

// Groups of a matrix of BITS with COUNT rows of x from `row` on.
template <int BITS, int COUNT>
void multiply_rows(const PackedMatrix& matrix, const IntegerRows& x, int64_t row, int64_t group, float* y) {
    constexpr int WAYS = COUNT == 1 ? 4 : COUNT == 2 ? 2 : 1;  // sums side by side, for an addition takes its time
    const __m512i low = _mm512_set1_epi8(15);
    const int64_t inputs = matrix.inputs(), blocks = inputs / matrix.block(), block = matrix.block();
    const uint8_t* at = matrix.group(group);
    const int8_t* integers = x.integers + row * inputs;
    __m512 totals[COUNT];
    for (int one = 0; one < COUNT; ++one) {
        totals[one] = matrix.bias() == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(matrix.bias() + group * GROUP);
    }
    for (int64_t index = 0; index < blocks; ++index) {
        const __m512 scales = _mm512_loadu_ps(at);
        at += LINE;
        __m512i sums[COUNT][WAYS];
        for (int one = 0; one < COUNT; ++one) {
            sums[one][0] = _mm512_set1_epi32(-(BITS == 8 ? 128 : 8) * x.sums[(row + one) * blocks + index]);
            for (int way = 1; way < WAYS; ++way) sums[one][way] = _mm512_setzero_si512();
        }
        const auto add = [&](__m512i numbers, int64_t input, int way) {
            for (int one = 0; one < COUNT; ++one) {
                int32_t four;
                std::memcpy(&four, integers + one * inputs + input, sizeof four);
                sums[one][way] = _mm512_dpbusd_epi32(sums[one][way], numbers, _mm512_set1_epi32(four));
            }
        };
        for (int64_t input = index * block; input < (index + 1) * block; input += 32) {
            for (int part = 0; part < BITS; ++part) {
                const __m512i numbers = _mm512_loadu_si512(at);
                at += LINE;
                if (BITS == 8) {
                    add(numbers, input + 4 * part, part % WAYS);
                } else {
                    add(_mm512_and_si512(numbers, low), input + 8 * part, 2 * part % WAYS);
                    add(_mm512_and_si512(_mm512_srli_epi16(numbers, 4), low), input + 8 * part + 4, (2 * part + 1) % WAYS);
                }
            }
        }
        for (int one = 0; one < COUNT; ++one) {
            for (int way = 1; way < WAYS; ++way) sums[one][0] = _mm512_add_epi32(sums[one][0], sums[one][way]);
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[(row + one) * blocks + index]));
            totals[one] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[one][0]), scale, totals[one]);
        }
    }
    const int64_t outputs = matrix.outputs(), first = group * GROUP;
    const auto mask = static_cast<__mmask16>(outputs - first >= GROUP ? 0xFFFF : (1 << (outputs - first)) - 1);
    for (int one = 0; one < COUNT; ++one) _mm512_mask_storeu_ps(y + (row + one) * outputs + first, mask, totals[one]);
}

template <int BITS>
void multiply_groups(const PackedMatrix& matrix, const IntegerRows& x, int64_t rows, int64_t first, int64_t stop, float* y) {
    for (int64_t group = first; group < stop; ++group) {
        int64_t row = 0;
        for (; row + ROWS <= rows; row += ROWS) multiply_rows<BITS, ROWS>(matrix, x, row, group, y);
        if (rows - row >= 4) multiply_rows<BITS, 4>(matrix, x, row, group, y), row += 4;
        if (rows - row >= 2) multiply_rows<BITS, 2>(matrix, x, row, group, y), row += 2;
        if (rows - row >= 1) multiply_rows<BITS, 1>(matrix, x, row, group, y);
    }
}

}  // namespace

void quantize_rows(const float* x, int64_t inputs, int64_t block, int64_t first, int64_t stop, const IntegerRows& rows) {
    for (int64_t index = first * (inputs / block); index < stop * (inputs / block); ++index) {
        const float* from = x + index * block;
        int8_t* to = rows.integers + index * block;
        __m512 largest = _mm512_setzero_ps();
        for (int64_t at = 0; at < block; at += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(from + at)));
        const float scale = _mm512_reduce_max_ps(largest) / 127.0f;
        const __m512 factor = _mm512_set1_ps(scale > 0 ? 1.0f / scale : 0.0f);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t at = 0; at < block; at += 16) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + at), factor));
            sum = _mm512_add_epi32(sum, whole);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + at), _mm512_cvtsepi32_epi8(whole));
        }
        rows.scales[index] = scale;
        rows.sums[index] = _mm512_reduce_add_epi32(sum);
    }
}

void multiply(const PackedMatrix& matrix, const IntegerRows& x, int64_t rows, int64_t first, int64_t stop, float* y) {
    if (matrix.bits() == 8) {
        multiply_groups<8>(matrix, x, rows, first, stop, y);
    } else {
        multiply_groups<4>(matrix, x, rows, first, stop, y);
    }
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

bool multiplies_blocks() { return false; }
void quantize_rows(const float*, int64_t, int64_t, int64_t, int64_t, const IntegerRows&) { std::abort(); }
void multiply(const PackedMatrix&, const IntegerRows&, int64_t, int64_t, int64_t, float*) { std::abort(); }

#endif

}  // namespace framestep
