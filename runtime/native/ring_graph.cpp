#include "ring_graph.h"

namespace framestep {
namespace {

// A ring on its way into an attention.
struct Ring {
    const OnnxNode* update = nullptr;      // null: none that can be replaced
    const OnnxNode* quantizer = nullptr;   // of rings of integers
    const OnnxNode* dequantizer = nullptr;
    std::string_view written;              // what goes into the slot, float32
};

bool updates(const OnnxGraph& graph, const OnnxNode* node, const std::set<std::string>& rings) {
    return node != nullptr && node->is("TensorScatter", 3) && node->integer("axis") == 2 &&
           node->text("mode").value_or("linear") == "linear" && rings.count(std::string(node->inputs[0])) != 0 &&
           graph.readers(node->outputs[0]) == 1;
}

// Between float32 and INT8, a scale for each row of axis 1.
bool scales_rows(const OnnxNode* node, std::string_view type, OnnxType to) {
    return node != nullptr && node->is(type, 2) && node->has_only({"axis", "output_dtype"}) && node->integer("axis") == 1 &&
           node->integer("output_dtype").value_or(0) == static_cast<int64_t>(to);
}

Ring ring_of(const OnnxGraph& graph, std::string_view value, const Rings& rings) {
    const OnnxNode* node = graph.producer(value);
    if (updates(graph, node, rings.floats)) return {node, nullptr, nullptr, node->inputs[1]};
    if (!scales_rows(node, "DequantizeLinear", OnnxType::float32) || !graph.is_between(value)) return {};
    const OnnxNode* update = graph.producer(node->inputs[0]);
    if (!updates(graph, update, rings.integers) || !graph.is_between(update->inputs[1])) return {};
    const OnnxNode* quantizer = graph.producer(update->inputs[1]);
    if (!scales_rows(quantizer, "QuantizeLinear", OnnxType::int8) || quantizer->inputs[1] != node->inputs[1]) return {};
    return {update, quantizer, node, quantizer->inputs[0]};
}

}  // namespace

ReplacedRings replace_ring_attention(OnnxGraph& graph, const Rings& rings) {
    ReplacedRings count;
    for (const OnnxNode& attention : graph.nodes()) {
        if (!attention.is("Attention", 4) || !attention.has_only({"scale"}) || attention.attributes.empty()) continue;
        const Ring key = ring_of(graph, attention.inputs[1], rings), value = ring_of(graph, attention.inputs[2], rings);
        if (key.update == nullptr || value.update == nullptr || key.update->inputs[2] != value.update->inputs[2]) continue;
        const bool integers = key.quantizer != nullptr;
        if (integers != (value.quantizer != nullptr)) continue;
        std::vector<std::string_view> inputs = {attention.inputs[0],  key.update->inputs[0], key.written,
                                                value.update->inputs[0], value.written, key.update->inputs[2],
                                                attention.inputs[3]};
        if (integers) inputs.insert(inputs.end(), {key.quantizer->inputs[1], value.quantizer->inputs[1]});
        graph.replace(attention,
                      own_node(integers ? INTEGER_RING_OPERATOR : RING_OPERATOR, inputs,
                               {attention.outputs[0], key.update->outputs[0], value.update->outputs[0]},
                               {std::string(attention.attributes.at("scale"))}));
        for (const Ring& ring : {key, value}) {
            for (const OnnxNode* node : {ring.update, ring.quantizer, ring.dequantizer}) {
                if (node != nullptr) graph.replace(*node, "");
            }
        }
        ++(integers ? count.integers : count.floats);
    }
    return count;
}

}  // namespace framestep
