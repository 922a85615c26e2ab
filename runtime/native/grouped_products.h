// Products of float32 with a constant matrix, whose outputs are taken in groups: in float32; in bfloat16, to which both are
// rounded then (to the nearest, ties to even; what is below the smallest normal number becomes 0); or in INT8, of which the
// matrix is, with a scale for each output, and to which x is rounded with one scale: what is too large, infinity too, becomes
// the largest of them, and NaN in a row makes its products NaN. Sums are float32, those of INT8 exact.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "packed_memory.h"

namespace framestep {

// What is added to a product and done with the sum.
struct Epilogue {
    const float* bias = nullptr;  // [outputs], null for none
    bool gelu = false;            // by its approximation with the hyperbolic tangent
};

// A matrix [inputs, outputs] as the kernels read it: a group of 48 outputs after the other; of a group, INPUTS inputs of
// each output at a time. Filled up with zeros.
template <class Its, int64_t INPUTS>
class GroupedMatrix {
public:
    using Number = Its;
    static constexpr int64_t GROUP = 48, TOGETHER = 1;  // groups that are multiplied together

    // `matrix` are the bytes of INT8 or else float32 [inputs, outputs], or `transposed`, wherever they lie.
    GroupedMatrix(std::string_view matrix, int64_t inputs, int64_t outputs, bool transposed, const Epilogue& epilogue);

    int64_t inputs() const { return inputs_; }
    int64_t outputs() const { return outputs_; }
    int64_t groups() const { return (outputs_ + GROUP - 1) / GROUP; }
    size_t group_bytes() const { return static_cast<size_t>(GROUP * padded(inputs_)) * sizeof(Number); }
    const Number* group(int64_t index) const {
        return reinterpret_cast<const Number*>(data_.data() + static_cast<size_t>(index) * group_bytes());
    }
    const float* bias() const { return bias_.data(); }  // padded to whole groups
    bool gelu() const { return gelu_; }

    static int64_t padded(int64_t inputs) { return (inputs + INPUTS - 1) / INPUTS * INPUTS; }
    // How many numbers a row of x takes that was made ready.
    static int64_t row_size(int64_t inputs) { return padded(inputs); }

private:
    int64_t inputs_, outputs_;
    PackedMemory data_;
    std::vector<float> bias_;
    bool gelu_;
};

using FloatMatrix = GroupedMatrix<float, 1>;
using Bfloat16Matrix = GroupedMatrix<uint16_t, 2>;

class IntegerMatrix : public GroupedMatrix<int8_t, 4> {
public:
    static constexpr int64_t MOST_INPUTS = (int64_t{1} << 17) - 1;  // their sum has 32 bits

    // A product is `input_scale` * scales[output] times the sum of integers.
    IntegerMatrix(std::string_view matrix, int64_t inputs, int64_t outputs, float input_scale, const float* scales,
                  const Epilogue& epilogue);

    // With room for integers of 16 bits. Behind those of a row stands a float that is added to all its products, for integers
    // cannot say it: 0, or NaN where the row had one.
    static int64_t row_size(int64_t inputs) { return 2 * padded(inputs) + static_cast<int64_t>(sizeof(float)); }

    float input_scale() const { return input_scale_; }
    const float* scales() const { return scales_.data(); }    // both; padded to whole groups, as the next is
    const int32_t* starts() const { return starts_.data(); }  // of the sums, where rows have 128 added to their integers

private:
    float input_scale_;
    std::vector<float> scales_;
    std::vector<int32_t> starts_;
};

template <class Matrix>
struct ProductKernels {
    // Rows first..stop of x [rows, inputs] into those of rows [rows, row_size(inputs)]; null where x is multiplied as it is.
    void (*round)(const Matrix& matrix, const float* x, int64_t first, int64_t stop, typename Matrix::Number* rows);
    // Groups first..stop of y [count, outputs].
    void (*multiply)(const Matrix& matrix, const typename Matrix::Number* rows, int64_t count, int64_t first, int64_t stop,
                     float* y);
};

// Null where this processor has no such instructions: AVX-512, and AVX512-BF16 beside it.
const ProductKernels<FloatMatrix>* float_kernels();
const ProductKernels<Bfloat16Matrix>* bfloat16_kernels();

enum class IntegerSimd { avx2, avx512_vnni };
const ProductKernels<IntegerMatrix>* integer_kernels_with(IntegerSimd simd);
// The fastest; null also where ONNX Runtime's own are faster.
const ProductKernels<IntegerMatrix>* integer_kernels();

}  // namespace framestep
