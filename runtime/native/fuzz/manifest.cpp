// A manifest that is accepted can be asked for everything that a session asks for.
#include "manifest.h"

#include <cstdlib>

using namespace framestep;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try {
        const Bundle bundle = parse_manifest({reinterpret_cast<const char*>(data), size}, "bundle");
        for (const Manifest& manifest : bundle.precisions) {
            std::vector<std::string> outputs;
            for (const Graph& graph : manifest.graphs) {
                for (const Port& port : graph.outputs) outputs.push_back(port.name);
            }
            if (graphs_for(manifest, outputs).size() > manifest.graphs.size()) std::abort();
            for (const State& state : manifest.states) {
                if (state.bytes() == 0 || state.shape.at(static_cast<size_t>(state.axis)) < state.capacity)
                    std::abort();
            }
            if (bundle.at(manifest.precision).precision != manifest.precision ||
                dump_sorted(manifest.states_as_written).empty())
                std::abort();
        }
        for (const char* device : {"cpu", "cuda"}) bundle.choose("auto", device);
    } catch (const Error& error) {
        if (error.code != FS_ERROR_BUNDLE) std::abort();
    }
    return 0;
}
