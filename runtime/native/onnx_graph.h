// A model's bytes as a graph whose nodes can be replaced; all else stays byte for byte.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace framestep {

constexpr const char* OWN_DOMAIN = "framestep";  // of the operators that stand in derived graphs

struct OnnxNode {
    std::vector<std::string_view> inputs, outputs;
    std::string_view type, domain;
    std::map<std::string_view, std::string_view> attributes;  // by name: the whole AttributeProto

    // Of the default domain, with so many inputs and one output.
    bool is(std::string_view wanted, size_t inputs_wanted) const;
    std::optional<int64_t> integer(std::string_view name) const;
    std::optional<std::string_view> text(std::string_view name) const;
    std::vector<int64_t> integers(std::string_view name) const;
    // No attribute but those.
    bool has_only(std::initializer_list<std::string_view> names) const;
};

enum class OnnxType { float32 = 1, int8 = 3, int64 = 7, int4 = 22 };

// A constant: its numbers are in the graph, or in a file.
struct OnnxTensor {
    int64_t type = 0;
    std::vector<int64_t> shape;
    std::string_view raw;       // little-endian; empty where they are in a file
    std::string location;       // of the file, relative to the graph's folder
    uint64_t offset = 0;
    uint64_t length = 0;        // in the file; 0 where only the shape says it

    bool is(OnnxType wanted) const { return type == static_cast<int64_t>(wanted); }
};

class OnnxGraph {
public:
    // Borrows the bytes. Throws ProtobufDamaged.
    explicit OnnxGraph(std::string_view model);

    // None where a node has graphs of its own: those read values of this one as well.
    const std::vector<OnnxNode>& nodes() const { return nodes_; }
    // The node that makes a value; null for an input or a constant.
    const OnnxNode* producer(std::string_view value) const;
    size_t number(const OnnxNode& node) const { return static_cast<size_t>(&node - nodes_.data()); }
    // Inputs of nodes that a value is.
    size_t readers(std::string_view value) const;
    bool is_output(std::string_view value) const { return outputs_.count(value) != 0; }
    // Made for one reader: it may disappear together with it.
    bool is_between(std::string_view value) const { return readers(value) == 1 && !is_output(value); }
    // Nothing also where a constant's numbers are fields of their own and not bytes.
    std::optional<OnnxTensor> constant(std::string_view name) const;
    // Of a constant of few int64 in the graph itself; empty for another.
    std::vector<int64_t> constant_integers(std::string_view name) const;

    // Another NodeProto in the place of a node; "" for none.
    void replace(const OnnxNode& node, std::string by) { replaced_[number(node)] = std::move(by); }

    // The model with its replaced nodes, with `OWN_DOMAIN`, without the constants that only those read; but for the graph's
    // inputs and outputs. "" where nothing was replaced.
    std::string write() const;

private:
    std::string_view model_, graph_;
    std::vector<OnnxNode> nodes_;
    std::map<std::string_view, size_t> producers_, readers_;
    std::set<std::string_view> inputs_, outputs_;
    std::map<std::string_view, std::string_view> constants_;  // TensorProto
    std::map<size_t, std::string> replaced_;
};

// A NodeProto of `OWN_DOMAIN`; `attributes` are whole AttributeProtos.
std::string own_node(std::string_view type, const std::vector<std::string_view>& inputs,
                     const std::vector<std::string_view>& outputs, const std::vector<std::string>& attributes);
std::string integer_attribute(std::string_view name, int64_t value);

}  // namespace framestep
