#include "product_graph.h"

#include <map>
#include <utility>

namespace framestep {
namespace {

using Text = std::string_view;

constexpr int64_t UNIT = 32;                  // inputs: the size of a block is a multiple
constexpr int64_t MOST = int64_t{1} << 31;   // inputs or outputs

struct Place {
    const OnnxNode* product;
    const OnnxNode* dequantizer;
    const OnnxNode* addition;  // null for none
    BlockProduct what;
};

// The product, or nothing where the node is none of those that are replaced.
std::optional<Place> place_of(const OnnxGraph& graph, const OnnxNode& product,
                              const std::map<Text, const OnnxNode*>& additions) {
    if (!product.is("MatMul", 2)) return std::nullopt;
    const OnnxNode* dequantizer = graph.producer(product.inputs[1]);
    if (dequantizer == nullptr || !dequantizer->is("DequantizeLinear", 2) || !graph.is_between(product.inputs[1]) ||
        dequantizer->integer("axis") != 0 || !dequantizer->has_only({"axis", "block_size"})) {
        return std::nullopt;
    }
    auto integers = graph.constant(dequantizer->inputs[0]), scales = graph.constant(dequantizer->inputs[1]);
    if (!integers || !scales || integers->shape.size() != 2 || !scales->is(OnnxType::float32)) return std::nullopt;
    Place place = {&product, dequantizer, nullptr, {}};
    BlockProduct& what = place.what;
    what.bits = integers->is(OnnxType::int8) ? 8 : integers->is(OnnxType::int4) ? 4 : 0;
    what.inputs = integers->shape[0];
    what.outputs = integers->shape[1];
    what.block = dequantizer->integer("block_size").value_or(0);
    if (what.bits == 0 || what.inputs < 1 || what.inputs > MOST || what.outputs < 1 || what.outputs > MOST ||
        what.block < UNIT || what.block % UNIT != 0 || what.inputs % what.block != 0 ||
        scales->shape != std::vector<int64_t>{what.inputs / what.block, what.outputs}) {
        return std::nullopt;
    }
    what.integers = *std::move(integers);
    what.scales = *std::move(scales);
    const auto addition = additions.find(product.outputs[0]);
    if (addition != additions.end() && graph.is_between(product.outputs[0])) {
        const auto& inputs = addition->second->inputs;
        auto bias = graph.constant(inputs[0] == product.outputs[0] ? inputs[1] : inputs[0]);
        if (bias && bias->is(OnnxType::float32) && bias->shape == std::vector<int64_t>{what.outputs}) {
            place.addition = addition->second;
            what.bias = std::move(bias);
        }
    }
    return place;
}

}  // namespace

std::vector<std::vector<BlockProduct>> replace_block_products(OnnxGraph& graph, size_t first) {
    std::map<Text, const OnnxNode*> additions;  // by both inputs
    for (const OnnxNode& node : graph.nodes()) {
        if (!node.is("Add", 2)) continue;
        for (const Text input : node.inputs) additions[input] = &node;
    }
    std::vector<std::vector<Place>> groups;
    std::map<std::pair<Text, int64_t>, size_t> numbers;  // of groups, by x and block
    for (const OnnxNode& node : graph.nodes()) {
        auto place = place_of(graph, node, additions);
        if (!place) continue;
        const auto [at, is_new] = numbers.try_emplace({node.inputs[0], place->what.block}, groups.size());
        if (!is_new && groups[at->second].size() == MOST_PRODUCTS) at->second = groups.size();
        if (at->second == groups.size()) groups.emplace_back();
        groups[at->second].push_back(*std::move(place));
    }
    std::vector<std::vector<BlockProduct>> products;
    for (std::vector<Place>& group : groups) {
        std::vector<Text> outputs;
        products.emplace_back();
        for (Place& place : group) {
            outputs.push_back((place.addition != nullptr ? place.addition : place.product)->outputs[0]);
            graph.replace(*place.product, "");
            graph.replace(*place.dequantizer, "");
            if (place.addition != nullptr) graph.replace(*place.addition, "");
            products.back().push_back(std::move(place.what));
        }
        const auto number = static_cast<int64_t>(first + products.size() - 1);
        graph.replace(*group.front().product, own_node(PRODUCTS_OPERATOR, {group.front().product->inputs[0]}, outputs,
                                                       {integer_attribute("products", number)}));
    }
    return products;
}

}  // namespace framestep
