// `BlockProducts`, `FloatProducts`, `Bfloat16Products` and `IntegerProducts` as operators that ONNX Runtime calls.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "block_products.h"
#include "grouped_products.h"
#include "own_operator.h"
#include "product_graph.h"

namespace framestep {

template <class Matrix>
using PackedProducts = std::vector<std::shared_ptr<const Matrix>>;  // of one x

template <class Matrix>
class ProductsKernel {
public:
    using Shared = std::vector<PackedProducts<Matrix>>;  // by the attribute `products`
    static constexpr size_t INPUTS = 1, OUTPUTS = 0;
    static OrtElement input_type(size_t) { return ORT_FLOAT; }
    static OrtElement output_type(size_t) { return ORT_FLOAT; }

    ProductsKernel(const Ort& its, const Shared* shared, const OrtKernelInfo* info)
        : ort(its), products_(shared->at(static_cast<size_t>(KernelCalls(its).integer(info, "products")))) {}

    const Ort& ort;

protected:
    PackedProducts<Matrix> products_;
};

class BlockProductsKernel : public ProductsKernel<PackedMatrix> {
public:
    static constexpr const char* NAME = BLOCK_PRODUCTS_OPERATOR;
    using ProductsKernel::ProductsKernel;
    void compute(OrtKernelContext* context) const;
};

class FloatProductsKernel : public ProductsKernel<FloatMatrix> {
public:
    static constexpr const char* NAME = FLOAT_PRODUCTS_OPERATOR;
    using ProductsKernel::ProductsKernel;
    void compute(OrtKernelContext* context) const;
};

// Of a Matrix to whose numbers x is rounded.
template <class Matrix>
class RoundedProductsKernel : public ProductsKernel<Matrix> {
public:
    static constexpr const char* NAME =
        std::is_same_v<Matrix, IntegerMatrix> ? INTEGER_PRODUCTS_OPERATOR : BFLOAT16_PRODUCTS_OPERATOR;
    using ProductsKernel<Matrix>::ProductsKernel;
    void compute(OrtKernelContext* context) const;
};

using Bfloat16ProductsKernel = RoundedProductsKernel<Bfloat16Matrix>;
using IntegerProductsKernel = RoundedProductsKernel<IntegerMatrix>;

}  // namespace framestep
