// Of any graph: products with integers in blocks become nodes whose kernel is `multiply` of block_products.h.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "onnx_graph.h"

namespace framestep {

constexpr const char* PRODUCTS_OPERATOR = "BlockProducts";
constexpr size_t MOST_PRODUCTS = 8;  // in one node

// A product as a graph has it.
struct BlockProduct {
    int bits = 0;
    int64_t inputs = 0, outputs = 0, block = 0;
    OnnxTensor integers, scales;
    std::optional<OnnxTensor> bias;
};

// Every `MatMul` with a blocked `DequantizeLinear` of symmetric INT8 or INT4 constants, with the `Add` of a constant
// [outputs] where one follows, is replaced. Those of one x and one size of blocks become one node
//     BlockProducts(x) -> y for each
// with the attribute `products`: a number from `first` on, at which the result has them.
std::vector<std::vector<BlockProduct>> replace_block_products(OnnxGraph& graph, size_t first);

}  // namespace framestep
