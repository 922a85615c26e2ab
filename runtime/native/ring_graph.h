// Of a step graph over rings: attention over a ring and the two updates of that ring become one node, whose kernel is
// `RingAttention`.
#pragma once

#include <set>
#include <string>

#include "onnx_graph.h"

namespace framestep {

constexpr const char* RING_OPERATOR = "RingAttention";
constexpr const char* INTEGER_RING_OPERATOR = "IntegerRingAttention";

struct Rings {
    std::set<std::string> floats, integers;  // graph inputs, float32 and int8 [S, rows, window, width]
};

struct ReplacedRings {
    size_t floats = 0, integers = 0;  // attentions, each over two rings
};

// Every `Attention` whose keys and values come from a `TensorScatter` each, over axis 2 at the same index, of graph inputs
// among `rings`, and feed nothing else, is replaced together with them by a node
//     RingAttention(query, past_key, new_key, past_value, new_value, index, mask) -> result, present_key, present_value
// with the attribute `scale`. Where the rings are of integers, what is written passes a `QuantizeLinear` over axis 1, what
// the attention reads a `DequantizeLinear` with the same scales, without zero points; these go as well, and the node is
//     IntegerRingAttention(..., key_scale, value_scale) -> ...
ReplacedRings replace_ring_attention(OnnxGraph& graph, const Rings& rings);

}  // namespace framestep
