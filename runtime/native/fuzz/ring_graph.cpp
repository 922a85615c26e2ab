// A derived graph is whole.
#include "ring_graph.h"

#include <cstdlib>

#include "protobuf.h"

using namespace framestep;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::set<std::string> rings = {"layer0.key.past", "layer0.value.past", "k", "v"};
    const std::string derived = with_ring_attention({reinterpret_cast<const char*>(data), size}, rings);
    if (derived.empty()) return 0;
    try {
        ProtobufFields fields(derived);
        ProtobufField field;
        while (fields.next(field)) {
        }
    } catch (const ProtobufDamaged&) {
        std::abort();  // it was not damaged before
    }
    return 0;
}
