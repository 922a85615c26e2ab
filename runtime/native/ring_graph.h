// Of a step graph over rings: attention over a ring and the two updates of that ring become one node, whose kernel is
// `RingAttention`.
#pragma once

#include <set>
#include <string>

#include "onnx_graph.h"

namespace framestep {

constexpr const char* RING_OPERATOR = "RingAttention";

// Every `Attention` whose keys and values come from a `TensorScatter` each, over axis 2 at the same index, of graph inputs
// among `rings`, and feed nothing else, is replaced together with them by a node
//     RingAttention(query, past_key, new_key, past_value, new_value, index, mask) -> result, present_key, present_value
// with the attribute `scale`. Gives their number.
size_t replace_ring_attention(OnnxGraph& graph, const std::set<std::string>& rings);

}  // namespace framestep
