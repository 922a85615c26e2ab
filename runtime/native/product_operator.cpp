#include "product_operator.h"

#include <algorithm>

namespace framestep {
namespace {

constexpr size_t PART = 64 << 10;       // bytes of a matrix that a thread takes at a time
constexpr int64_t FEW = 4;              // rows that one thread rounds faster than two
constexpr int64_t MANY = 4;             // rows from which on a thread takes several groups of a matrix together
constexpr double LITTLE = 128 << 10;    // multiplications that one thread is done with before another has begun
constexpr int64_t ROWS_AT_ONCE = 256;  // that are kept rounded
constexpr int64_t ALL_ROWS = INT64_MAX;

template <class Number>
Number* room_for(std::vector<Number>& numbers, int64_t count) {
    numbers.resize(std::max(numbers.size(), static_cast<size_t>(count)));
    return numbers.data();
}

// round(first, stop) for rows first..stop, on several threads where there are many.
template <class Round>
void round_rows(const KernelCalls& calls, OrtKernelContext* context, int64_t count, const Round& round) {
    if (count <= FEW) return round(0, count);
    calls.parallel(context, count, [&](int64_t row) { round(row, row + 1); });
}

// y of each product, of so many rows of x at a time. `prepare(x, count)` makes these rows ready; `multiply(matrix, count,
// first, stop, y)` computes groups of y from them, and is called by several threads.
template <class Matrix, class Prepare, class Multiply>
void compute_products(const KernelCalls& calls, OrtKernelContext* context, const PackedProducts<Matrix>& products,
                      int64_t rows_at_once, const Prepare& prepare, const Multiply& multiply) {
    const OrtValue* input = calls.input(context, 0);
    TensorShape shape = calls.shape(input);
    const int64_t inputs = products.front()->inputs();
    if (shape.rank < 1 || shape.rank > TensorShape::MOST || shape.sizes[shape.rank - 1] != inputs) {
        throw Refused{"x has no rows of " + std::to_string(inputs) + " numbers, or more than " +
                      std::to_string(TensorShape::MOST) + " axes"};
    }
    int64_t rows = 1;
    for (size_t axis = 0; axis + 1 < shape.rank; ++axis) rows *= shape.sizes[axis];
    const int64_t unit = rows < MANY ? 1 : Matrix::TOGETHER;  // groups that a thread takes together
    const auto units = [&](const Matrix& matrix) { return (matrix.groups() + unit - 1) / unit; };
    float* results[MOST_PRODUCTS];
    int64_t parts[MOST_PRODUCTS], total = 0, outputs = 0;
    for (size_t index = 0; index < products.size(); ++index) {
        const Matrix& matrix = *products[index];
        shape.sizes[shape.rank - 1] = matrix.outputs();
        results[index] = calls.data<float>(calls.output(context, index, shape));
        const auto bytes = static_cast<size_t>(matrix.groups()) * matrix.group_bytes();
        parts[index] = std::min(units(matrix), static_cast<int64_t>((bytes + PART - 1) / PART));
        total += parts[index];
        outputs += matrix.outputs();
    }
    const auto* x = calls.data<const float>(input);
    for (int64_t from = 0; from < rows; from += rows_at_once) {
        const int64_t count = std::min(rows_at_once, rows - from);
        prepare(x + from * inputs, count);
        const auto compute = [&](int64_t part) {
            size_t index = 0;
            for (; part >= parts[index]; ++index) part -= parts[index];
            const Matrix& matrix = *products[index];
            const auto border = [&](int64_t of) {
                return std::min(of * units(matrix) / parts[index] * unit, matrix.groups());
            };
            multiply(matrix, count, border(part), border(part + 1), results[index] + from * matrix.outputs());
        };
        if (static_cast<double>(count) * inputs * outputs < LITTLE) {
            for (int64_t part = 0; part < total; ++part) compute(part);
        } else {
            calls.parallel(context, total, compute);
        }
    }
}

template <class Matrix>
const ProductKernels<Matrix>* kernels_of();
template <>
const ProductKernels<Bfloat16Matrix>* kernels_of() {
    return bfloat16_kernels();
}
template <>
const ProductKernels<IntegerMatrix>* kernels_of() {
    return integer_kernels();
}

}  // namespace

void BlockProductsKernel::compute(OrtKernelContext* context) const {
    struct Room {  // kept from run to run; each thread that calls runs has its own
        std::vector<int8_t> integers;
        std::vector<float> scales;
        std::vector<int32_t> sums;
    };
    thread_local Room room;
    const BlockKernels& kernels = *fastest_block_kernels();
    const int64_t inputs = products_.front()->inputs(), block = products_.front()->block();
    const KernelCalls calls(ort);
    IntegerRows rows = {};
    compute_products(
        calls, context, products_, ROWS_AT_ONCE,
        [&](const float* x, int64_t count) {
            const int64_t blocks = count * (inputs / block);
            rows = {room_for(room.integers, count * inputs), room_for(room.scales, blocks), room_for(room.sums, blocks)};
            round_rows(calls, context, count, [&](int64_t first, int64_t stop) {
                kernels.quantize(x, inputs, block, first, stop, rows);
            });
        },
        [&](const PackedMatrix& matrix, int64_t count, int64_t first, int64_t stop, float* y) {
            kernels.multiply(matrix, rows, count, first, stop, y);
        });
}

void FloatProductsKernel::compute(OrtKernelContext* context) const {
    const ProductKernels<FloatMatrix>& kernels = *float_kernels();
    const float* rows = nullptr;
    compute_products(
        KernelCalls(ort), context, products_, ALL_ROWS, [&](const float* x, int64_t) { rows = x; },
        [&](const FloatMatrix& matrix, int64_t count, int64_t first, int64_t stop, float* y) {
            kernels.multiply(matrix, rows, count, first, stop, y);
        });
}

template <class Matrix>
void RoundedProductsKernel<Matrix>::compute(OrtKernelContext* context) const {
    using Number = typename Matrix::Number;
    thread_local std::vector<Number> room;
    const ProductKernels<Matrix>& kernels = *kernels_of<Matrix>();
    const Matrix& any = *this->products_.front();  // x is rounded in the same way for each
    const KernelCalls calls(this->ort);
    Number* rows = nullptr;
    compute_products(
        calls, context, this->products_, ROWS_AT_ONCE,
        [&](const float* x, int64_t count) {
            rows = room_for(room, count * Matrix::row_size(any.inputs()));
            round_rows(calls, context, count, [&](int64_t first, int64_t stop) { kernels.round(any, x, first, stop, rows); });
        },
        [&](const Matrix& matrix, int64_t count, int64_t first, int64_t stop, float* y) {
            kernels.multiply(matrix, rows, count, first, stop, y);
        });
}

template class RoundedProductsKernel<Bfloat16Matrix>;
template class RoundedProductsKernel<IntegerMatrix>;

}  // namespace framestep
