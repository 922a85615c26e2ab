#include "ring_graph.h"

#include <map>
#include <optional>
#include <vector>

#include "protobuf.h"

// The field numbers are those of `onnx.proto`.

namespace framestep {
namespace {

using Text = std::string_view;

struct Node {
    std::vector<Text> inputs, outputs;
    Text type, domain;
    std::map<Text, Text> attributes;  // by name: the whole AttributeProto
};

Node read_node(Text content) {
    Node node;
    ProtobufFields fields(content);
    ProtobufField field;
    while (fields.next(field)) {
        if (!field.is_message) continue;
        switch (field.number) {
            case 1: node.inputs.push_back(field.content); break;
            case 2: node.outputs.push_back(field.content); break;
            case 4: node.type = field.content; break;
            case 7: node.domain = field.content; break;
            case 5: {
                ProtobufFields attribute(field.content);
                ProtobufField part;
                while (attribute.next(part)) {
                    if (part.number == 1 && part.is_message) node.attributes[part.content] = field.content;
                }
                break;
            }
            default: break;
        }
    }
    return node;
}

// An attribute's integer (field 3) or text (field 4).
std::optional<ProtobufField> value_of(const Node& node, Text name, uint64_t number) {
    const auto found = node.attributes.find(name);
    if (found == node.attributes.end()) return std::nullopt;
    ProtobufFields fields(found->second);
    ProtobufField field;
    while (fields.next(field)) {
        if (field.number == number) return field;
    }
    return std::nullopt;
}

bool updates_ring(const Node& node, const std::set<std::string>& rings) {
    if (node.type != "TensorScatter" || !node.domain.empty() || node.inputs.size() != 3 || node.outputs.size() != 1) return false;
    const auto axis = value_of(node, "axis", 3);
    const auto mode = value_of(node, "mode", 4);
    return axis && axis->integer == 2 && (!mode || mode->content == "linear") && rings.count(std::string(node.inputs[0])) != 0;
}

bool attends(const Node& node) {
    if (node.type != "Attention" || !node.domain.empty() || node.inputs.size() != 4 || node.outputs.size() != 1) return false;
    for (const auto& attribute : node.attributes) {
        if (attribute.first != "scale") return false;
    }
    return node.attributes.count("scale") != 0;
}

}  // namespace

std::string with_ring_attention(std::string_view onnx, const std::set<std::string>& rings) {
    try {
        Text graph;
        ProtobufFields model(onnx);
        ProtobufField field;
        while (model.next(field)) {
            if (field.number == 7 && field.is_message) graph = field.content;
        }
        std::vector<Node> nodes;
        std::map<Text, size_t> producers, uses;
        ProtobufFields parts(graph);
        while (parts.next(field)) {
            if (field.number != 1 || !field.is_message) continue;
            nodes.push_back(read_node(field.content));
            for (const Text output : nodes.back().outputs) producers[output] = nodes.size() - 1;
            for (const Text input : nodes.back().inputs) ++uses[input];
        }
        std::map<size_t, std::string> replaced;  // the Attention's number, and the node in its place
        std::set<size_t> dropped;
        for (size_t index = 0; index < nodes.size(); ++index) {
            const Node& attention = nodes[index];
            if (!attends(attention)) continue;
            const auto key = producers.find(attention.inputs[1]), value = producers.find(attention.inputs[2]);
            if (key == producers.end() || value == producers.end()) continue;
            const Node &keys = nodes[key->second], &values = nodes[value->second];
            if (!updates_ring(keys, rings) || !updates_ring(values, rings) || keys.inputs[2] != values.inputs[2]) continue;
            if (uses[keys.outputs[0]] != 1 || uses[values.outputs[0]] != 1) continue;
            std::string node;
            for (const Text name : {attention.inputs[0], keys.inputs[0], keys.inputs[1], values.inputs[0], values.inputs[1],
                                    keys.inputs[2], attention.inputs[3]}) {
                put_message(node, 1, name);
            }
            for (const Text name : {attention.outputs[0], keys.outputs[0], values.outputs[0]}) put_message(node, 2, name);
            put_message(node, 4, RING_OPERATOR);
            put_message(node, 5, attention.attributes.at("scale"));
            put_message(node, 7, RING_DOMAIN);
            replaced[index] = node;
            dropped.insert({key->second, value->second});
        }
        if (replaced.empty()) return "";

        std::string new_graph;
        size_t index = 0;
        parts = ProtobufFields(graph);
        while (parts.next(field)) {
            if (field.number != 1 || !field.is_message) {
                new_graph += field.raw;
                continue;
            }
            const auto found = replaced.find(index);
            if (found != replaced.end()) {
                put_message(new_graph, 1, found->second);
            } else if (dropped.count(index) == 0) {
                new_graph += field.raw;
            }
            ++index;
        }
        std::string result;
        model = ProtobufFields(onnx);
        while (model.next(field)) {
            if (field.number == 7 && field.is_message) {
                put_message(result, 7, new_graph);
            } else {
                result += field.raw;
            }
        }
        std::string operators;  // OperatorSetIdProto
        put_message(operators, 1, RING_DOMAIN);
        put_integer(operators, 2, 1);
        put_message(result, 8, operators);
        return result;
    } catch (const ProtobufDamaged&) {
        return "";
    }
}

}  // namespace framestep
