#include "cache_graph.h"

#include <map>

namespace framestep {
namespace {

using Text = std::string_view;

const std::vector<int64_t> HEADS_FIRST = {0, 2, 1, 3};

// [S, T, heads * d] to [S, heads, T, d]: the Reshape and the Transpose behind it.
struct Split {
    const OnnxNode* reshape = nullptr;
    const OnnxNode* transpose = nullptr;
    int64_t width = 0;
};

class Layers {
public:
    Layers(OnnxGraph& graph, const std::set<std::string>& caches) : graph_(graph), caches_(caches) {
        for (const OnnxNode& node : graph.nodes()) {
            for (const Text input : node.inputs) readers_.emplace(input, &node);
        }
    }

    bool replace(const OnnxNode& attention) {
        if (!attention.is("Attention", 4) || !attention.has_only({"scale"}) || attention.attributes.empty()) return false;
        const OnnxNode* query = made_by("RotaryEmbedding", 3, attention.inputs[0]);
        const OnnxNode* key_update = update(attention.inputs[1], 1);
        const OnnxNode* value_update = update(attention.inputs[2], 1);
        if (query == nullptr || key_update == nullptr || value_update == nullptr) return false;
        const OnnxNode* key = made_by("RotaryEmbedding", 3, key_update->inputs[1]);
        if (key == nullptr || !query->attributes.empty() || !key->attributes.empty() ||
            key->inputs[1] != query->inputs[1] || key->inputs[2] != query->inputs[2]) {
            return false;
        }
        const Split queries = split(query->inputs[0], 1), keys = split(key->inputs[0], 2);
        const Split values = split(value_update->inputs[1], 1);
        const OnnxNode* raw_update = nullptr;
        for (auto [at, end] = readers_.equal_range(key->inputs[0]); at != end; ++at) {
            if (at->second != key && at->second->outputs.size() == 1) raw_update = update(at->second->outputs[0], 0);
        }
        if (queries.width < 2 || queries.width % 2 != 0 || keys.width != queries.width || values.width != queries.width ||
            raw_update == nullptr || raw_update->inputs[1] != key->inputs[0] ||
            raw_update->inputs[2] != key_update->inputs[2] || value_update->inputs[2] != key_update->inputs[2]) {
            return false;
        }
        const OnnxNode* joined = only_reader("Transpose", 1, attention.outputs[0]);
        if (joined == nullptr || joined->integers("perm") != HEADS_FIRST) return false;
        const OnnxNode* result = only_reader("Reshape", 2, joined->outputs[0]);
        if (result == nullptr || !result->attributes.empty()) return false;
        const std::vector<int64_t> flat = graph_.constant_integers(result->inputs[1]);
        if (flat.size() != 3 || flat[0] != 0 || flat[1] != 0 || flat[2] == 0) return false;

        for (const OnnxNode* node : {queries.reshape, queries.transpose, keys.reshape, keys.transpose, values.reshape,
                                     values.transpose, query, key, raw_update, key_update, value_update, joined, result}) {
            graph_.replace(*node, "");
        }
        graph_.replace(attention,
                       own_node(CACHE_OPERATOR,
                                {queries.reshape->inputs[0], keys.reshape->inputs[0], values.reshape->inputs[0],
                                 query->inputs[1], query->inputs[2], raw_update->inputs[0], key_update->inputs[0],
                                 value_update->inputs[0], key_update->inputs[2], attention.inputs[3]},
                                {result->outputs[0], raw_update->outputs[0], key_update->outputs[0], value_update->outputs[0]},
                                {std::string(attention.attributes.at("scale"))}));
        return true;
    }

private:
    // The node that makes a value for one reader; null for another.
    const OnnxNode* made_by(Text type, size_t inputs, Text value) const {
        const OnnxNode* node = graph_.producer(value);
        return node != nullptr && node->is(type, inputs) && graph_.is_between(value) ? node : nullptr;
    }

    const OnnxNode* only_reader(Text type, size_t inputs, Text value) const {
        if (!graph_.is_between(value)) return nullptr;
        const OnnxNode* node = readers_.find(value)->second;
        return node->is(type, inputs) && node->inputs[0] == value ? node : nullptr;
    }

    // The node that makes a cache from one of `caches`, where it has so many readers beside being an output.
    const OnnxNode* update(Text value, size_t readers) const {
        const OnnxNode* node = graph_.producer(value);
        const bool fits = node != nullptr && node->is("TensorScatter", 3) && node->integer("axis") == 2 &&
                          node->text("mode").value_or("linear") == "linear" && graph_.readers(value) == readers &&
                          caches_.count(std::string(node->inputs[0])) != 0 && graph_.readers(node->inputs[0]) == 1;
        return fits ? node : nullptr;
    }

    Split split(Text value, size_t readers) const {
        const OnnxNode* transpose = graph_.producer(value);
        if (transpose == nullptr || !transpose->is("Transpose", 1) || transpose->integers("perm") != HEADS_FIRST ||
            graph_.readers(value) != readers || graph_.is_output(value)) {
            return {};
        }
        const OnnxNode* reshape = made_by("Reshape", 2, transpose->inputs[0]);
        if (reshape == nullptr || !reshape->attributes.empty()) return {};
        const std::vector<int64_t> shape = graph_.constant_integers(reshape->inputs[1]);
        if (shape.size() != 4 || shape[0] != 0 || shape[1] != 0 || shape[3] < 1) return {};
        return {reshape, transpose, shape[3]};
    }

    OnnxGraph& graph_;
    const std::set<std::string>& caches_;
    std::multimap<Text, const OnnxNode*> readers_;
};

}  // namespace

size_t replace_cached_attention(OnnxGraph& graph, const std::set<std::string>& caches) {
    Layers layers(graph, caches);
    size_t count = 0;
    for (const OnnxNode& node : graph.nodes()) count += layers.replace(node);
    return count;
}

}  // namespace framestep
