// Of any graph: products with a constant matrix become nodes whose kernels are those of block_products.h and
// grouped_products.h.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "onnx_graph.h"

namespace framestep {

constexpr const char* BLOCK_PRODUCTS_OPERATOR = "BlockProducts";
constexpr const char* FLOAT_PRODUCTS_OPERATOR = "FloatProducts";
constexpr const char* BFLOAT16_PRODUCTS_OPERATOR = "Bfloat16Products";
constexpr const char* INTEGER_PRODUCTS_OPERATOR = "IntegerProducts";
constexpr size_t MOST_PRODUCTS = 8;  // in one node

// A product as a graph has it.
struct ConstantProduct {
    int64_t inputs = 0, outputs = 0;
    OnnxTensor matrix;             // integers, or float32
    bool transposed = false;       // it has the shape [outputs, inputs]
    std::optional<OnnxTensor> bias;
    bool gelu = false;             // by tanh, behind the bias
    int bits = 0;                  // of integers in blocks
    int64_t block = 0;             // 0 for none
    std::optional<OnnxTensor> scales;
    float input_scale = 0;         // with which x is rounded to INT8; 0: it is not
};

// Every `MatMul` with a constant matrix of a kind (of float32, also a `Gemm` that does no more), with the `Add` of a constant
// [outputs] where one follows, is replaced; but with blocks, the `Gelu` behind as well. Those of one x, rounded alike, become one node
//     BlockProducts(x) -> y for each, or FloatProducts, Bfloat16Products, IntegerProducts
// with the attribute `products`: a number from `first` on, at which the result has them.

// Matrices that a blocked `DequantizeLinear` makes of symmetric INT8 or INT4 constants.
std::vector<std::vector<ConstantProduct>> replace_block_products(OnnxGraph& graph, size_t first);
// Matrices of float32; `bfloat16`: in which they are multiplied then.
std::vector<std::vector<ConstantProduct>> replace_float_products(OnnxGraph& graph, size_t first, bool bfloat16);
// Symmetric INT8 matrices with a scale for each output, and x that is rounded to symmetric INT8 with one.
std::vector<std::vector<ConstantProduct>> replace_integer_products(OnnxGraph& graph, size_t first);

}  // namespace framestep
