// Products with a matrix of integers in blocks: weight-only INT8 and INT4, which a graph says as a blocked
// `DequantizeLinear` before a `MatMul`. A product of few rows is bound by reading the matrix: it is laid out so that it is
// read once, from its first byte to its last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "packed_memory.h"

namespace framestep {

// The matrix as a graph has it: integer [inputs, outputs] times scale [inputs / block, outputs].
struct BlockMatrix {
    int bits = 8;               // 8, or 4: two integers in a byte, the first one low
    int64_t inputs = 0;         // a multiple of `block`
    int64_t outputs = 0;
    int64_t block = 0;          // inputs that share a scale, a multiple of 32 up to PackedMatrix::MOST_IN_BLOCK
    const uint8_t* integers = nullptr;
    const float* scales = nullptr;
    const float* bias = nullptr;  // [outputs]; null for none
};

// The same numbers as the kernels read them: a group of 16 outputs after the other; of a group, block by block, the 16
// scales and then the integers, plus 128 or 8, four inputs of each output at a time (with 4 bits: eight, the second four in
// the high halves).
class PackedMatrix {
public:
    static constexpr int64_t GROUP = 16, TOGETHER = 3;        // groups that may be multiplied together
    static constexpr int64_t MOST_IN_BLOCK = int64_t{1} << 16;  // inputs: their sums have 32 bits, on the way as well

    explicit PackedMatrix(const BlockMatrix& matrix);

    int bits() const { return bits_; }
    int64_t inputs() const { return inputs_; }
    int64_t outputs() const { return outputs_; }
    int64_t block() const { return block_; }
    int64_t groups() const { return (outputs_ + GROUP - 1) / GROUP; }
    size_t group_bytes() const { return group_bytes_; }
    const uint8_t* group(int64_t index) const { return data_.data() + static_cast<size_t>(index) * group_bytes_; }
    const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }  // padded to whole groups

private:
    int bits_;
    int64_t inputs_, outputs_, block_;
    size_t group_bytes_;
    PackedMemory data_;
    std::vector<float> bias_;
};

// Rows of float32 as integers: each block of a row by the scale at which its largest number is 127. A block with a number
// that is not finite gets a scale that is not, and so no product with it is.
struct IntegerRows {
    int8_t* integers;  // [rows, inputs]
    float* scales;     // [rows, inputs / block]
    int32_t* sums;     // [rows, inputs / block], of the integers
};

// The two kernels for one instruction set.
struct BlockKernels {
    // Rows first..stop of x [rows, inputs].
    void (*quantize)(const float* x, int64_t inputs, int64_t block, int64_t first, int64_t stop, const IntegerRows& rows);
    // Groups first..stop of y [rows, outputs] = x matrix + bias. Sums of a block are exact; those of blocks are float32.
    void (*multiply)(const PackedMatrix& matrix, const IntegerRows& x, int64_t rows, int64_t first, int64_t stop, float* y);
};

enum class BlockSimd { avx2, avx512_vnni };
// Null where this processor has no such instructions; without any, a graph keeps its nodes.
const BlockKernels* block_kernels_with(BlockSimd simd);
const BlockKernels* fastest_block_kernels();

}  // namespace framestep
