// A derived graph is whole, and a node's products are as many and as large as its kernel takes them to be.
#include <cstdlib>

#include "cache_graph.h"
#include "product_graph.h"
#include "protobuf.h"
#include "ring_graph.h"

using namespace framestep;

static void check(const std::vector<std::vector<ConstantProduct>>& nodes) {
    for (const auto& products : nodes) {
        if (products.empty() || products.size() > MOST_PRODUCTS) std::abort();
        for (const ConstantProduct& product : products) {
            if (product.inputs != products.front().inputs || product.block != products.front().block) std::abort();
        }
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::set<std::string> rings = {"layer0.key.past", "layer0.value.past", "k", "v"};
    const std::set<std::string> caches = {"decoder.layer0.key.past", "decoder.layer0.raw_key.past",
                                          "decoder.layer0.value.past", "k", "r", "v"};
    std::string derived;
    try {
        OnnxGraph graph({reinterpret_cast<const char*>(data), size});
        replace_ring_attention(graph, {rings, rings});
        replace_cached_attention(graph, caches);
        check(replace_block_products(graph, 0));
        check(replace_integer_products(graph, 0));
        check(replace_float_products(graph, 0, true));
        derived = graph.write();
    } catch (const ProtobufDamaged&) {
        return 0;
    }
    if (derived.empty()) return 0;
    try {
        OnnxGraph again(derived);
    } catch (const ProtobufDamaged&) {
        std::abort();  // it was not damaged before
    }
    return 0;
}
