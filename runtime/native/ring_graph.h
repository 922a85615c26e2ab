// Derives from a step graph the one that ONNX Runtime's CPU runs: attention over a ring and the two updates of that ring
// become one node, whose kernel is `RingAttention`.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace framestep {

constexpr const char* RING_DOMAIN = "framestep";
constexpr const char* RING_OPERATOR = "RingAttention";

// In the model `onnx` (the bytes of a file) every `Attention` whose keys and values come from a `TensorScatter` each, over
// axis 2 at the same index, of graph inputs among `rings`, and feed nothing else, is replaced together with them by a node
//     RingAttention(query, past_key, new_key, past_value, new_value, index, mask) -> result, present_key, present_value
// with the attribute `scale`. All else stays byte for byte. Gives "" where there is none, or where the file is damaged:
// ONNX Runtime then says why.
std::string with_ring_attention(std::string_view onnx, const std::set<std::string>& rings);

}  // namespace framestep
