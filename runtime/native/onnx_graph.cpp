#include "onnx_graph.h"

#include <algorithm>
#include <cstring>

#include "protobuf.h"

// The field numbers are those of `onnx.proto`.

namespace framestep {
namespace {

using Text = std::string_view;

constexpr uint64_t GRAPH = 7, OPERATOR_SETS = 8;                          // of ModelProto
constexpr uint64_t NODE = 1, INITIALIZER = 5, INPUT = 11, OUTPUT = 12;    // of GraphProto
constexpr size_t FEW = 64;                                                // integers in a constant
constexpr int INT_ATTRIBUTE = 2;
constexpr uint64_t EXTERNAL = 1;                                          // data_location of a TensorProto

// The name stands in field `number` of a message.
Text name_in(Text message, uint64_t number) {
    ProtobufFields fields(message);
    ProtobufField field;
    Text name;
    while (fields.next(field)) {
        if (field.number == number && field.is_message) name = field.content;
    }
    return name;
}

OnnxNode read_node(Text content) {
    OnnxNode node;
    ProtobufFields fields(content);
    ProtobufField field;
    while (fields.next(field)) {
        if (!field.is_message) continue;
        switch (field.number) {
            case 1: node.inputs.push_back(field.content); break;
            case 2: node.outputs.push_back(field.content); break;
            case 4: node.type = field.content; break;
            case 5: node.attributes[name_in(field.content, 1)] = field.content; break;
            case 7: node.domain = field.content; break;
            default: break;
        }
    }
    return node;
}

bool has_graphs(const OnnxNode& node) {
    constexpr uint64_t GRAPH_VALUE = 6, GRAPH_VALUES = 11;  // of AttributeProto
    for (const auto& attribute : node.attributes) {
        ProtobufFields fields(attribute.second);
        ProtobufField field;
        while (fields.next(field)) {
            if (field.number == GRAPH_VALUE || field.number == GRAPH_VALUES) return true;
        }
    }
    return false;
}

// A repeated integer, packed or one by one.
void read_integers(const ProtobufField& field, std::vector<int64_t>& out) {
    if (!field.is_message) return out.push_back(static_cast<int64_t>(field.integer));
    for (Text left = field.content; !left.empty();) out.push_back(static_cast<int64_t>(take_varint(left)));
}

std::optional<ProtobufField> field_of(const OnnxNode& node, Text attribute, uint64_t number) {
    const auto found = node.attributes.find(attribute);
    if (found == node.attributes.end()) return std::nullopt;
    ProtobufFields fields(found->second);
    ProtobufField field;
    while (fields.next(field)) {
        if (field.number == number) return field;
    }
    return std::nullopt;
}

uint64_t number_in(Text text) {
    uint64_t number = 0;
    for (const char digit : text) {
        if (digit < '0' || digit > '9' || __builtin_mul_overflow(number, 10, &number) ||
            __builtin_add_overflow(number, static_cast<uint64_t>(digit - '0'), &number)) {
            throw ProtobufDamaged();
        }
    }
    return number;
}

}  // namespace

bool OnnxNode::is(Text wanted, size_t inputs_wanted) const {
    return type == wanted && domain.empty() && inputs.size() == inputs_wanted && outputs.size() == 1;
}

std::optional<int64_t> OnnxNode::integer(Text name) const {
    const auto field = field_of(*this, name, 3);
    return field ? std::optional(static_cast<int64_t>(field->integer)) : std::nullopt;
}

std::optional<Text> OnnxNode::text(Text name) const {
    const auto field = field_of(*this, name, 4);
    return field ? std::optional(field->content) : std::nullopt;
}

std::vector<int64_t> OnnxNode::integers(Text name) const {
    std::vector<int64_t> numbers;
    const auto found = attributes.find(name);
    if (found == attributes.end()) return numbers;
    ProtobufFields fields(found->second);
    ProtobufField field;
    while (fields.next(field)) {
        if (field.number == 8) read_integers(field, numbers);
    }
    return numbers;
}

bool OnnxNode::has_only(std::initializer_list<Text> names) const {
    return std::all_of(attributes.begin(), attributes.end(), [&](const auto& attribute) {
        return std::find(names.begin(), names.end(), attribute.first) != names.end();
    });
}

OnnxGraph::OnnxGraph(Text model) : model_(model) {
    ProtobufField field;
    for (ProtobufFields fields(model); fields.next(field);) {
        if (field.number == GRAPH && field.is_message) graph_ = field.content;
    }
    for (ProtobufFields fields(graph_); fields.next(field);) {
        if (!field.is_message) continue;
        if (field.number == NODE) nodes_.push_back(read_node(field.content));
        if (field.number == INITIALIZER) constants_[name_in(field.content, 8)] = field.content;
        if (field.number == INPUT) inputs_.insert(name_in(field.content, 1));
        if (field.number == OUTPUT) outputs_.insert(name_in(field.content, 1));
    }
    if (std::any_of(nodes_.begin(), nodes_.end(), has_graphs)) nodes_.clear();
    for (size_t index = 0; index < nodes_.size(); ++index) {
        for (const Text output : nodes_[index].outputs) producers_[output] = index;
        for (const Text input : nodes_[index].inputs) ++readers_[input];
    }
}

const OnnxNode* OnnxGraph::producer(Text value) const {
    const auto found = producers_.find(value);
    return found == producers_.end() ? nullptr : &nodes_[found->second];
}

size_t OnnxGraph::readers(Text value) const {
    const auto found = readers_.find(value);
    return found == readers_.end() ? 0 : found->second;
}

std::optional<OnnxTensor> OnnxGraph::constant(Text name) const {
    const auto found = constants_.find(name);
    if (found == constants_.end()) return std::nullopt;
    OnnxTensor tensor;
    bool in_file = false;
    ProtobufFields fields(found->second);
    ProtobufField field;
    while (fields.next(field)) {
        switch (field.number) {
            case 1: read_integers(field, tensor.shape); break;
            case 2: tensor.type = static_cast<int64_t>(field.integer); break;
            case 9: tensor.raw = field.content; break;
            case 13: {
                const Text key = name_in(field.content, 1), value = name_in(field.content, 2);
                if (key == "location") tensor.location = value;
                if (key == "offset") tensor.offset = number_in(value);
                if (key == "length") tensor.length = number_in(value);
                break;
            }
            case 14: in_file = field.integer == EXTERNAL; break;  // else a place in a file means nothing
            default: break;
        }
    }
    if (in_file) {
        tensor.raw = {};
    } else {
        tensor.location.clear();
    }
    if (tensor.raw.empty() && tensor.location.empty()) return std::nullopt;
    return tensor;
}

std::vector<int64_t> OnnxGraph::constant_integers(Text name) const {
    const auto tensor = constant(name);
    if (!tensor || !tensor->is(OnnxType::int64) || tensor->raw.size() % sizeof(int64_t) != 0 ||
        tensor->raw.size() > FEW * sizeof(int64_t)) {
        return {};
    }
    std::vector<int64_t> numbers(tensor->raw.size() / sizeof(int64_t));
    if (!numbers.empty()) std::memcpy(numbers.data(), tensor->raw.data(), tensor->raw.size());
    return numbers;
}

std::string OnnxGraph::write() const {
    if (replaced_.empty()) return "";
    std::set<Text> kept = inputs_;  // a constant may be one as well: without its numbers they would have to be given
    kept.insert(outputs_.begin(), outputs_.end());
    for (size_t index = 0; index < nodes_.size(); ++index) {
        if (replaced_.count(index) == 0) kept.insert(nodes_[index].inputs.begin(), nodes_[index].inputs.end());
    }
    for (const auto& [index, node] : replaced_) {
        ProtobufField field;
        for (ProtobufFields fields(node); fields.next(field);) {
            if (field.number == 1) kept.insert(field.content);
        }
    }
    std::string graph;
    graph.reserve(graph_.size());
    size_t index = 0;
    ProtobufField field;
    for (ProtobufFields fields(graph_); fields.next(field);) {
        if (field.number == INITIALIZER && field.is_message) {
            const Text name = name_in(field.content, 8);
            if (kept.count(name) != 0 || readers(name) == 0) graph += field.raw;
        } else if (field.number == NODE && field.is_message) {
            const auto found = replaced_.find(index++);
            if (found == replaced_.end()) {
                graph += field.raw;
            } else if (!found->second.empty()) {
                put_message(graph, NODE, found->second);
            }
        } else {
            graph += field.raw;
        }
    }
    std::string result;
    for (ProtobufFields fields(model_); fields.next(field);) {
        if (field.number == GRAPH && field.is_message) {
            put_message(result, GRAPH, graph);
        } else {
            result += field.raw;
        }
    }
    std::string operators;  // OperatorSetIdProto
    put_message(operators, 1, OWN_DOMAIN);
    put_integer(operators, 2, 1);
    put_message(result, OPERATOR_SETS, operators);
    return result;
}

std::string own_node(Text type, const std::vector<Text>& inputs, const std::vector<Text>& outputs,
                     const std::vector<std::string>& attributes) {
    std::string node;
    for (const Text name : inputs) put_message(node, 1, name);
    for (const Text name : outputs) put_message(node, 2, name);
    put_message(node, 4, type);
    for (const std::string& attribute : attributes) put_message(node, 5, attribute);
    put_message(node, 7, OWN_DOMAIN);
    return node;
}

std::string integer_attribute(Text name, int64_t value) {
    std::string attribute;
    put_message(attribute, 1, name);
    put_integer(attribute, 3, static_cast<uint64_t>(value));
    put_integer(attribute, 20, INT_ATTRIBUTE);
    return attribute;
}

}  // namespace framestep
