// Products of float32 with a constant matrix of float32 in bfloat16: both are rounded to it (to the nearest, ties to even;
// what is below the smallest normal number becomes 0), and summed in float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "packed_memory.h"

namespace framestep {

// A matrix [inputs, outputs] as the kernels read it: a group of 48 outputs after the other; of a group, two inputs of each
// output at a time. Filled up with zeros.
class Bfloat16Matrix {
public:
    static constexpr int64_t GROUP = 48;

    // `matrix` are the bytes of float32 [inputs, outputs], wherever they lie; `bias` [outputs], null for none.
    Bfloat16Matrix(std::string_view matrix, int64_t inputs, int64_t outputs, const float* bias);

    int64_t inputs() const { return inputs_; }
    int64_t outputs() const { return outputs_; }
    int64_t groups() const { return (outputs_ + GROUP - 1) / GROUP; }
    size_t group_bytes() const { return static_cast<size_t>(GROUP * even(inputs_)) * sizeof(uint16_t); }
    const uint16_t* group(int64_t index) const {
        return reinterpret_cast<const uint16_t*>(data_.data() + static_cast<size_t>(index) * group_bytes());
    }
    const float* bias() const { return bias_.data(); }  // padded to whole groups

    static int64_t even(int64_t inputs) { return inputs + inputs % 2; }

private:
    int64_t inputs_, outputs_;
    PackedMemory data_;
    std::vector<float> bias_;
};

struct Bfloat16Kernels {
    // Rows first..stop of x [rows, inputs] into those of rows [rows, even(inputs)].
    void (*round)(const float* x, int64_t inputs, int64_t first, int64_t stop, uint16_t* rows);
    // Groups first..stop of y [count, outputs] = rows matrix + bias.
    void (*multiply)(const Bfloat16Matrix& matrix, const uint16_t* rows, int64_t count, int64_t first, int64_t stop, float* y);
};

// Null where this processor has no such instructions (AVX512-BF16).
const Bfloat16Kernels* bfloat16_kernels();

}  // namespace framestep
