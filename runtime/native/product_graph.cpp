#include "product_graph.h"

#include <cmath>
#include <map>
#include <tuple>
#include <utility>

#include "block_products.h"
#include "grouped_products.h"

namespace framestep {
namespace {

using Text = std::string_view;
using Products = std::vector<std::vector<ConstantProduct>>;

constexpr int64_t UNIT = 32;                // inputs: the size of a block is a multiple
constexpr int64_t MOST = int64_t{1} << 30;  // inputs or outputs: the bytes of a matrix can be counted in 64 bits

struct Place {
    const OnnxNode* product;
    std::vector<const OnnxNode*> before;  // that go with it
    Text x;
    ConstantProduct what;
    std::vector<const OnnxNode*> behind;  // the same

    const OnnxNode& last() const { return behind.empty() ? *product : *behind.back(); }
};

bool has_size(const ConstantProduct& what) {
    return what.inputs >= 1 && what.inputs <= MOST && what.outputs >= 1 && what.outputs <= MOST;
}

// The product, or nothing where the node is none of those that are replaced.
std::optional<Place> block_place(const OnnxGraph& graph, const OnnxNode& product) {
    if (!product.is("MatMul", 2)) return std::nullopt;
    const OnnxNode* dequantizer = graph.producer(product.inputs[1]);
    if (dequantizer == nullptr || !dequantizer->is("DequantizeLinear", 2) || !graph.is_between(product.inputs[1]) ||
        dequantizer->integer("axis") != 0 || !dequantizer->has_only({"axis", "block_size"})) {
        return std::nullopt;
    }
    auto integers = graph.constant(dequantizer->inputs[0]), scales = graph.constant(dequantizer->inputs[1]);
    if (!integers || !scales || integers->shape.size() != 2 || !scales->is(OnnxType::float32)) return std::nullopt;
    Place place = {&product, {dequantizer}, product.inputs[0], {}, {}};
    ConstantProduct& what = place.what;
    what.bits = integers->is(OnnxType::int8) ? 8 : integers->is(OnnxType::int4) ? 4 : 0;
    what.inputs = integers->shape[0];
    what.outputs = integers->shape[1];
    what.block = dequantizer->integer("block_size").value_or(0);
    if (what.bits == 0 || !has_size(what) || what.block < UNIT || what.block > PackedMatrix::MOST_IN_BLOCK ||
        what.block % UNIT != 0 || what.inputs % what.block != 0 ||
        scales->shape != std::vector<int64_t>{what.inputs / what.block, what.outputs}) {
        return std::nullopt;
    }
    what.matrix = *std::move(integers);
    what.scales = std::move(scales);
    return place;
}

// The constant [outputs], where it is one.
std::optional<OnnxTensor> bias_of(const OnnxGraph& graph, Text name, const ConstantProduct& what) {
    auto bias = graph.constant(name);
    const bool fits = bias && bias->is(OnnxType::float32) && bias->shape == std::vector<int64_t>{what.outputs};
    return fits ? bias : std::nullopt;
}

std::optional<Place> float_place(const OnnxGraph& graph, const OnnxNode& product) {
    const bool biased = product.is("Gemm", 3);
    const bool plain = product.is("MatMul", 2) || ((biased || product.is("Gemm", 2)) && product.has_only({"transB"}));
    if (!plain) return std::nullopt;
    auto matrix = graph.constant(product.inputs[1]);
    if (!matrix || !matrix->is(OnnxType::float32) || matrix->shape.size() != 2 || graph.constant(product.inputs[0])) {
        return std::nullopt;
    }
    Place place = {&product, {}, product.inputs[0], {}, {}};
    ConstantProduct& what = place.what;
    what.transposed = product.integer("transB").value_or(0) != 0;
    what.inputs = matrix->shape[what.transposed ? 1 : 0];
    what.outputs = matrix->shape[what.transposed ? 0 : 1];
    if (!has_size(what)) return std::nullopt;
    what.matrix = *std::move(matrix);
    if (biased) {
        what.bias = bias_of(graph, product.inputs[2], what);
        if (!what.bias) return std::nullopt;
    }
    return place;
}

bool is_one_number(const OnnxTensor& tensor) { return tensor.shape.empty() || tensor.shape == std::vector<int64_t>{1}; }

// Of a symmetric INT8 quantizer, or of what undoes one: its scale, where that is one number in the graph itself.
std::optional<float> scale_of(const OnnxGraph& graph, const OnnxNode& quantizer) {
    const auto scale = graph.constant(quantizer.inputs[1]), zero = graph.constant(quantizer.inputs[2]);
    float value = 0;
    if (!scale || !scale->is(OnnxType::float32) || !is_one_number(*scale) || scale->raw.size() != sizeof value || !zero ||
        !zero->is(OnnxType::int8) || !is_one_number(*zero) || zero->raw != Text("\0", 1)) {
        return std::nullopt;
    }
    scale->raw.copy(reinterpret_cast<char*>(&value), sizeof value);
    if (!std::isnormal(value) || value < 0) return std::nullopt;
    return value;
}

std::optional<Place> integer_place(const OnnxGraph& graph, const OnnxNode& product) {
    if (!product.is("MatMul", 2)) return std::nullopt;
    const OnnxNode *rounded = graph.producer(product.inputs[0]), *matrix = graph.producer(product.inputs[1]);
    if (rounded == nullptr || !rounded->is("DequantizeLinear", 3) || !rounded->attributes.empty() ||
        !graph.is_between(product.inputs[0]) || matrix == nullptr || !matrix->is("DequantizeLinear", 2) ||
        !graph.is_between(product.inputs[1]) || matrix->integer("axis") != 1 || !matrix->has_only({"axis"})) {
        return std::nullopt;
    }
    const OnnxNode* quantizer = graph.producer(rounded->inputs[0]);
    if (quantizer == nullptr || !quantizer->is("QuantizeLinear", 3) || !quantizer->attributes.empty() ||
        !graph.is_between(rounded->inputs[0])) {
        return std::nullopt;
    }
    const auto scale = scale_of(graph, *quantizer);
    auto integers = graph.constant(matrix->inputs[0]), scales = graph.constant(matrix->inputs[1]);
    if (!scale || scale_of(graph, *rounded) != scale || !integers || !integers->is(OnnxType::int8) ||
        integers->shape.size() != 2 || !scales || !scales->is(OnnxType::float32)) {
        return std::nullopt;
    }
    Place place = {&product, {rounded, quantizer, matrix}, quantizer->inputs[0], {}, {}};
    ConstantProduct& what = place.what;
    what.inputs = integers->shape[0];
    what.outputs = integers->shape[1];
    what.input_scale = *scale;
    if (!has_size(what) || what.inputs > IntegerMatrix::MOST_INPUTS || scales->shape != std::vector<int64_t>{what.outputs}) {
        return std::nullopt;
    }
    what.matrix = *std::move(integers);
    what.scales = std::move(scales);
    return place;
}

// By what it reads: the only node of a type that reads it, if nothing else does.
class Followers {
public:
    Followers(const OnnxGraph& graph, Text type, size_t inputs) : graph_(graph) {
        for (const OnnxNode& node : graph.nodes()) {
            if (!node.is(type, inputs)) continue;
            for (const Text input : node.inputs) nodes_[input] = &node;
        }
    }

    const OnnxNode* of(const OnnxNode& node) const {
        const auto found = nodes_.find(node.outputs[0]);
        return found != nodes_.end() && graph_.is_between(node.outputs[0]) ? found->second : nullptr;
    }

private:
    const OnnxGraph& graph_;
    std::map<Text, const OnnxNode*> nodes_;
};

// The products that `place_of` finds.
template <class PlaceOf>
Products replace_products(OnnxGraph& graph, size_t first, const char* by, const PlaceOf& place_of) {
    const Followers additions(graph, "Add", 2), gelus(graph, "Gelu", 1);
    std::vector<std::vector<Place>> groups;
    // of groups, by x, its size (a damaged graph may have two) and how it is rounded
    std::map<std::tuple<Text, int64_t, int64_t, float>, size_t> numbers;
    for (const OnnxNode& node : graph.nodes()) {
        auto place = place_of(graph, node);
        if (!place) continue;
        ConstantProduct& what = place->what;
        const OnnxNode* addition = additions.of(node);
        if (addition != nullptr && !what.bias) {
            const auto& inputs = addition->inputs;
            what.bias = bias_of(graph, inputs[0] == node.outputs[0] ? inputs[1] : inputs[0], what);
            if (what.bias) place->behind.push_back(addition);
        }
        const OnnxNode* gelu = gelus.of(place->last());
        if (gelu != nullptr && what.block == 0 && gelu->text("approximate") == "tanh" && gelu->has_only({"approximate"})) {
            place->behind.push_back(gelu);
            what.gelu = true;
        }
        const auto [at, is_new] = numbers.try_emplace({place->x, what.inputs, what.block, what.input_scale}, groups.size());
        if (!is_new && groups[at->second].size() == MOST_PRODUCTS) at->second = groups.size();
        if (at->second == groups.size()) groups.emplace_back();
        groups[at->second].push_back(*std::move(place));
    }
    Products products;
    for (std::vector<Place>& group : groups) {
        std::vector<Text> outputs;
        products.emplace_back();
        for (Place& place : group) {
            outputs.push_back(place.last().outputs[0]);
            graph.replace(*place.product, "");
            for (const auto& nodes : {place.before, place.behind}) {
                for (const OnnxNode* node : nodes) graph.replace(*node, "");
            }
            products.back().push_back(std::move(place.what));
        }
        const auto number = static_cast<int64_t>(first + products.size() - 1);
        graph.replace(*group.front().product,
                      own_node(by, {group.front().x}, outputs, {integer_attribute("products", number)}));
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

Products replace_integer_products(OnnxGraph& graph, size_t first) {
    return replace_products(graph, first, INTEGER_PRODUCTS_OPERATOR, integer_place);
}

}  // namespace framestep
