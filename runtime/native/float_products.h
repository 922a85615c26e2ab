// Products of float32 with a constant matrix of float32: in float32, or in bfloat16, to which both are rounded then (to the
// nearest, ties to even; what is below the smallest normal number becomes 0). Sums are float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "packed_memory.h"

namespace framestep {

// A matrix [inputs, outputs] as the kernels read it: a group of 48 outputs after the other; of a group, TOGETHER inputs of
// each output at a time. Filled up with zeros.
template <class Its, int64_t TOGETHER>
class GroupedMatrix {
public:
    using Number = Its;
    static constexpr int64_t GROUP = 48;

    // `matrix` are the bytes of float32 [inputs, outputs], wherever they lie; `bias` [outputs], null for none.
    GroupedMatrix(std::string_view matrix, int64_t inputs, int64_t outputs, const float* bias);

    int64_t inputs() const { return inputs_; }
    int64_t outputs() const { return outputs_; }
    int64_t groups() const { return (outputs_ + GROUP - 1) / GROUP; }
    size_t group_bytes() const { return static_cast<size_t>(GROUP * padded(inputs_)) * sizeof(Number); }
    const Number* group(int64_t index) const {
        return reinterpret_cast<const Number*>(data_.data() + static_cast<size_t>(index) * group_bytes());
    }
    const float* bias() const { return bias_.data(); }  // padded to whole groups

    // How many numbers a row has that is multiplied.
    static int64_t padded(int64_t inputs) { return (inputs + TOGETHER - 1) / TOGETHER * TOGETHER; }

private:
    int64_t inputs_, outputs_;
    PackedMemory data_;
    std::vector<float> bias_;
};

using FloatMatrix = GroupedMatrix<float, 1>;
using Bfloat16Matrix = GroupedMatrix<uint16_t, 2>;

template <class Matrix>
struct ProductKernels {
    // Rows first..stop of x [rows, inputs] into those of rows [rows, padded(inputs)]; null where x is multiplied as it is.
    void (*round)(const float* x, int64_t inputs, int64_t first, int64_t stop, typename Matrix::Number* rows);
    // Groups first..stop of y [count, outputs] = rows matrix + bias.
    void (*multiply)(const Matrix& matrix, const typename Matrix::Number* rows, int64_t count, int64_t first, int64_t stop,
                     float* y);
};

// Null where this processor has no such instructions: AVX-512, and AVX512-BF16 beside it.
const ProductKernels<FloatMatrix>* float_kernels();
const ProductKernels<Bfloat16Matrix>* bfloat16_kernels();

}  // namespace framestep
