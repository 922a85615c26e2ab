// `BlockProducts` as an operator that ONNX Runtime calls.
#pragma once

#include <memory>
#include <vector>

#include "block_products.h"
#include "own_operator.h"
#include "product_graph.h"

namespace framestep {

using PackedProducts = std::vector<std::shared_ptr<const PackedMatrix>>;  // of one x

class ProductsKernel {
public:
    using Shared = std::vector<PackedProducts>;  // by the attribute `products`
    static constexpr const char* NAME = PRODUCTS_OPERATOR;
    static constexpr size_t INPUTS = 1, OUTPUTS = 0;
    static OrtElement input_type(size_t) { return ORT_FLOAT; }

    ProductsKernel(const Ort& ort, const Shared* shared, const OrtKernelInfo* info);
    void compute(OrtKernelContext* context) const;

    const Ort& ort;

private:
    PackedProducts products_;
    const BlockKernels& kernels_;
};

}  // namespace framestep
