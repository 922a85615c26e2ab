// Of a decoder's step graph: attention over a linear cache, with all that only moves or rotates its operands, becomes one
// node, whose kernel is `CachedAttention`.
#pragma once

#include <set>
#include <string>

#include "onnx_graph.h"

namespace framestep {

constexpr const char* CACHE_OPERATOR = "CachedAttention";

// In a layer
//     q, k, v = Transpose(Reshape(query)), Transpose(Reshape(key)), Transpose(Reshape(value))
//     present_raw_key = TensorScatter(past_raw_key, k, index)
//     present_key = TensorScatter(past_key, RotaryEmbedding(k, cos, sin), index)
//     present_value = TensorScatter(past_value, v, index)
//     result = Reshape(Transpose(Attention(RotaryEmbedding(q, cos, sin), present_key, present_value, mask)))
// where no value in between has another reader and the caches are graph inputs among `caches`, all nodes together become
//     CachedAttention(query, key, value, cos, sin, past_raw_key, past_key, past_value, index, mask)
//         -> result, present_raw_key, present_key, present_value
// with the attribute `scale`. query is [S, T, H * d], key and value [S, T, G * d]. Gives the number of layers.
size_t replace_cached_attention(OnnxGraph& graph, const std::set<std::string>& caches);

}  // namespace framestep
