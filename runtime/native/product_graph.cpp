#include "product_graph.h"

#include <map>
#include <utility>

namespace framestep {
namespace {

using Text = std::string_view;
using Products = std::vector<std::vector<ConstantProduct>>;

constexpr int64_t UNIT = 32;                // inputs: the size of a block is a multiple
constexpr int64_t MOST = int64_t{1} << 30;  // inputs or outputs: the bytes of a matrix can be counted in 64 bits

struct Place {
    const OnnxNode* product;
    const OnnxNode* dequantizer;  // null for none
    const OnnxNode* addition;     // null for none
    ConstantProduct what;
};

bool has_size(const ConstantProduct& what) {
    return what.inputs >= 1 && what.inputs <= MOST && what.outputs >= 1 && what.outputs <= MOST;
}

// The product, or nothing where the node is none of those that are replaced.
std::optional<Place> block_place(const OnnxGraph& graph, const OnnxNode& product) {
    const OnnxNode* dequantizer = graph.producer(product.inputs[1]);
    if (dequantizer == nullptr || !dequantizer->is("DequantizeLinear", 2) || !graph.is_between(product.inputs[1]) ||
        dequantizer->integer("axis") != 0 || !dequantizer->has_only({"axis", "block_size"})) {
        return std::nullopt;
    }
    auto integers = graph.constant(dequantizer->inputs[0]), scales = graph.constant(dequantizer->inputs[1]);
    if (!integers || !scales || integers->shape.size() != 2 || !scales->is(OnnxType::float32)) return std::nullopt;
    Place place = {&product, dequantizer, nullptr, {}};
    ConstantProduct& what = place.what;
    what.bits = integers->is(OnnxType::int8) ? 8 : integers->is(OnnxType::int4) ? 4 : 0;
    what.inputs = integers->shape[0];
    what.outputs = integers->shape[1];
    what.block = dequantizer->integer("block_size").value_or(0);
    if (what.bits == 0 || !has_size(what) || what.block < UNIT || what.block % UNIT != 0 || what.inputs % what.block != 0 ||
        scales->shape != std::vector<int64_t>{what.inputs / what.block, what.outputs}) {
        return std::nullopt;
    }
    what.matrix = *std::move(integers);
    what.scales = std::move(scales);
    return place;
}

std::optional<Place> float_place(const OnnxGraph& graph, const OnnxNode& product) {
    auto matrix = graph.constant(product.inputs[1]);
    if (!matrix || !matrix->is(OnnxType::float32) || matrix->shape.size() != 2 || graph.constant(product.inputs[0])) {
        return std::nullopt;
    }
    Place place = {&product, nullptr, nullptr, {}};
    place.what.inputs = matrix->shape[0];
    place.what.outputs = matrix->shape[1];
    if (!has_size(place.what)) return std::nullopt;
    place.what.matrix = *std::move(matrix);
    return place;
}

// The products that `place_of` finds.
template <class PlaceOf>
Products replace_products(OnnxGraph& graph, size_t first, const char* by, const PlaceOf& place_of) {
    std::map<Text, const OnnxNode*> additions;  // by both inputs
    for (const OnnxNode& node : graph.nodes()) {
        if (!node.is("Add", 2)) continue;
        for (const Text input : node.inputs) additions[input] = &node;
    }
    std::vector<std::vector<Place>> groups;
    std::map<std::pair<Text, int64_t>, size_t> numbers;  // of groups, by x and block
    for (const OnnxNode& node : graph.nodes()) {
        if (!node.is("MatMul", 2)) continue;
        auto place = place_of(graph, node);
        if (!place) continue;
        ConstantProduct& what = place->what;
        const auto addition = additions.find(node.outputs[0]);
        if (addition != additions.end() && graph.is_between(node.outputs[0])) {
            const auto& inputs = addition->second->inputs;
            auto bias = graph.constant(inputs[0] == node.outputs[0] ? inputs[1] : inputs[0]);
            if (bias && bias->is(OnnxType::float32) && bias->shape == std::vector<int64_t>{what.outputs}) {
                place->addition = addition->second;
                what.bias = std::move(bias);
            }
        }
        const auto [at, is_new] = numbers.try_emplace({node.inputs[0], what.block}, groups.size());
        if (!is_new && groups[at->second].size() == MOST_PRODUCTS) at->second = groups.size();
        if (at->second == groups.size()) groups.emplace_back();
        groups[at->second].push_back(*std::move(place));
    }
    Products products;
    for (std::vector<Place>& group : groups) {
        std::vector<Text> outputs;
        products.emplace_back();
        for (Place& place : group) {
            outputs.push_back((place.addition != nullptr ? place.addition : place.product)->outputs[0]);
            for (const OnnxNode* node : {place.product, place.dequantizer, place.addition}) {
                if (node != nullptr) graph.replace(*node, "");
            }
            products.back().push_back(std::move(place.what));
        }
        const auto number = static_cast<int64_t>(first + products.size() - 1);
        graph.replace(*group.front().product,
                      own_node(by, {group.front().product->inputs[0]}, outputs, {integer_attribute("products", number)}));
    }
    return products;
}

}  // namespace

Products replace_block_products(OnnxGraph& graph, size_t first) {
    return replace_products(graph, first, BLOCK_PRODUCTS_OPERATOR, block_place);
}

Products replace_float_products(OnnxGraph& graph, size_t first, bool bfloat16) {
    return replace_products(graph, first, bfloat16 ? BFLOAT16_PRODUCTS_OPERATOR : FLOAT_PRODUCTS_OPERATOR, float_place);
}

}  // namespace framestep
