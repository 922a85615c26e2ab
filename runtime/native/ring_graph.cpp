#include "ring_graph.h"

namespace framestep {
namespace {

bool updates_ring(const OnnxNode* node, const std::set<std::string>& rings) {
    return node != nullptr && node->is("TensorScatter", 3) && node->integer("axis") == 2 &&
           node->text("mode").value_or("linear") == "linear" && rings.count(std::string(node->inputs[0])) != 0;
}

}  // namespace

size_t replace_ring_attention(OnnxGraph& graph, const std::set<std::string>& rings) {
    size_t count = 0;
    for (const OnnxNode& attention : graph.nodes()) {
        if (!attention.is("Attention", 4) || !attention.has_only({"scale"}) || attention.attributes.empty()) continue;
        const OnnxNode *key = graph.producer(attention.inputs[1]), *value = graph.producer(attention.inputs[2]);
        if (!updates_ring(key, rings) || !updates_ring(value, rings) || key->inputs[2] != value->inputs[2]) continue;
        if (graph.readers(key->outputs[0]) != 1 || graph.readers(value->outputs[0]) != 1) continue;
        graph.replace(attention,
                      own_node(RING_OPERATOR,
                               {attention.inputs[0], key->inputs[0], key->inputs[1], value->inputs[0], value->inputs[1],
                                key->inputs[2], attention.inputs[3]},
                               {attention.outputs[0], key->outputs[0], value->outputs[0]},
                               {std::string(attention.attributes.at("scale"))}));
        graph.replace(*key, "");
        graph.replace(*value, "");
        ++count;
    }
    return count;
}

}  // namespace framestep
