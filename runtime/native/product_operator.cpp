#include "product_operator.h"

#include <algorithm>

namespace framestep {
namespace {

constexpr size_t PART = 64 << 10;       // bytes of a matrix that a thread takes at a time
constexpr int64_t FEW = 4;              // rows that one thread makes integers of faster than two
constexpr int64_t ROWS_AT_ONCE = 256;  // whose integers are kept

struct Part {  // of a matrix, in groups
    size_t matrix;
    int64_t first, stop;
};

// Room for integers of rows, kept from run to run; each thread that calls runs has its own.
struct Room {
    std::vector<int8_t> integers;
    std::vector<float> scales;
    std::vector<int32_t> sums;

    IntegerRows of(int64_t rows, int64_t inputs, int64_t blocks) {
        const auto grow = [rows](auto& numbers, int64_t each) {
            numbers.resize(std::max(numbers.size(), static_cast<size_t>(rows * each)));
        };
        grow(integers, inputs);
        grow(scales, blocks);
        grow(sums, blocks);
        return {integers.data(), scales.data(), sums.data()};
    }
};

}  // namespace

ProductsKernel::ProductsKernel(const Ort& its, const Shared* shared, const OrtKernelInfo* info)
    : ort(its), products_(shared->at(static_cast<size_t>(KernelCalls(its).integer(info, "products")))),
      kernels_(*fastest_block_kernels()) {}

void ProductsKernel::compute(OrtKernelContext* context) const {
    const KernelCalls calls(ort);
    const OrtValue* input = calls.input(context, 0);
    TensorShape shape = calls.shape(input);
    const int64_t inputs = products_.front()->inputs(), block = products_.front()->block();
    if (shape.rank < 1 || shape.rank > TensorShape::MOST || shape.sizes[shape.rank - 1] != inputs) {
        throw Refused{"x has no rows of " + std::to_string(inputs) + " numbers"};
    }
    int64_t rows = 1;
    for (size_t axis = 0; axis + 1 < shape.rank; ++axis) rows *= shape.sizes[axis];
    float* results[MOST_PRODUCTS];
    for (size_t index = 0; index < products_.size(); ++index) {
        shape.sizes[shape.rank - 1] = products_[index]->outputs();
        results[index] = calls.data<float>(calls.output(context, index, shape));
    }
    int64_t parts[MOST_PRODUCTS], total = 0;
    for (size_t index = 0; index < products_.size(); ++index) {
        const PackedMatrix& matrix = *products_[index];
        const auto bytes = static_cast<size_t>(matrix.groups()) * matrix.group_bytes();
        parts[index] = std::min(matrix.groups(), static_cast<int64_t>((bytes + PART - 1) / PART));
        total += parts[index];
    }
    const auto* x = calls.data<const float>(input);
    thread_local Room room;
    for (int64_t from = 0; from < rows; from += ROWS_AT_ONCE) {
        const int64_t count = std::min(ROWS_AT_ONCE, rows - from);
        const float* first_row = x + from * inputs;
        const IntegerRows integers = room.of(count, inputs, inputs / block);
        if (count <= FEW) {
            kernels_.quantize(first_row, inputs, block, 0, count, integers);
        } else {
            calls.parallel(context, count, [&](int64_t row) { kernels_.quantize(first_row, inputs, block, row, row + 1, integers); });
        }
        calls.parallel(context, total, [&](int64_t part) {
            size_t index = 0;
            for (; part >= parts[index]; ++index) part -= parts[index];
            const PackedMatrix& matrix = *products_[index];
            kernels_.multiply(matrix, integers, count, part * matrix.groups() / parts[index],
                              (part + 1) * matrix.groups() / parts[index], results[index] + from * matrix.outputs());
        });
    }
}

}  // namespace framestep
