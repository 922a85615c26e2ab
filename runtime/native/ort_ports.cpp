#include "ort_ports.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "error.h"
#include "ort_session.h"

namespace framestep {
namespace {

using PortType = std::pair<int, std::vector<Dim>>;  // an OrtElement, and the shape
using Declared = std::map<std::string, PortType>;   // by name

// "float32 [S, 96]"
std::string text_of(const PortType& port) {
    std::string sizes, kind = "of type " + std::to_string(port.first);
    for (const fs_dtype dtype : {FS_UINT8, FS_INT8, FS_INT32, FS_INT64, FS_BOOL, FS_FLOAT16, FS_FLOAT32}) {
        if (element_of(dtype) == port.first) kind = name_of(dtype);
    }
    for (const Dim& dim : port.second) {
        sizes += (sizes.empty() ? "" : ", ") + (dim.symbol != 0 ? std::string(1, dim.symbol) : std::to_string(dim.size));
    }
    return kind + " [" + sizes + "]";
}

PortType describe(const Ort& ort, const OrtTypeInfo* type, const std::string& path) {
    const OrtTensorInfo* tensor = nullptr;
    ort.check(ort.CastTypeInfoToTensorInfo(type, &tensor), path);
    if (tensor == nullptr) return {0, {}};
    int element = 0;
    size_t rank = 0;
    ort.check(ort.GetTensorElementType(tensor, &element), path);
    ort.check(ort.GetDimensionsCount(tensor, &rank), path);
    std::vector<int64_t> sizes(rank);
    std::vector<const char*> symbols(rank);
    ort.check(ort.GetDimensions(tensor, sizes.data(), rank), path);
    ort.check(ort.GetSymbolicDimensions(tensor, symbols.data(), rank), path);
    std::vector<Dim> shape;
    for (size_t axis = 0; axis < rank; ++axis) {
        const bool named = sizes[axis] < 0 && symbols[axis] != nullptr && std::strlen(symbols[axis]) == 1;
        shape.push_back(sizes[axis] >= 0 ? Dim{sizes[axis], 0} : Dim{0, named ? symbols[axis][0] : '?'});
    }
    return {element, shape};
}

template <class GetName, class GetType>
void check_side(const Ort& ort, OrtNativeSession* session, const std::string& path, const std::string& kind,
                const Declared& declared, size_t count, GetName get_name, GetType get_type) {
    const auto refuse = [&](const std::string& name, const std::string& in_graph, const std::string& in_manifest) {
        throw Error(FS_ERROR_BUNDLE, path + ": " + kind + " '" + name + "' is " + in_graph + " in the graph and " +
                                         in_manifest + " in the manifest; export the bundle again");
    };
    OrtAllocator* allocator = nullptr;
    ort.check(ort.GetAllocatorWithDefaultOptions(&allocator), path);
    std::set<std::string> seen;
    for (size_t index = 0; index < count; ++index) {
        char* text = nullptr;
        ort.check(get_name(session, index, allocator, &text), path);
        const std::string name = text;
        ort.check(ort.AllocatorFree(allocator, text), path);
        const auto found = declared.find(name);
        Owned<OrtTypeInfo> type(ort.ReleaseTypeInfo);
        ort.check(get_type(session, index, type.into()), path);
        const auto actual = describe(ort, type.get(), path);
        if (found == declared.end()) refuse(name, text_of(actual), "absent");
        if (actual != found->second) refuse(name, text_of(actual), text_of(found->second));
        seen.insert(name);
    }
    for (const auto& item : declared) {
        if (seen.count(item.first) == 0) refuse(item.first, "absent", text_of(item.second));
    }
}

}  // namespace

void check_ports(const Ort& ort, OrtNativeSession* session, const std::string& path, const Graph& graph, const Manifest& manifest) {
    Declared inputs, outputs;
    for (const Port& port : graph.inputs) inputs[port.name] = {element_of(port.dtype), port.shape};
    for (const Port& port : graph.outputs) outputs[port.name] = {element_of(port.dtype), port.shape};
    for (const StateUse& use : graph.states) {
        const auto state = std::find_if(manifest.states.begin(), manifest.states.end(),
                                        [&](const State& one) { return one.name == use.state; });
        std::vector<Dim> shape = {{0, 'S'}};
        for (const int64_t size : state->shape) shape.push_back({size, 0});
        inputs[use.input] = {element_of(state->dtype), shape};
        if (!use.output.empty()) outputs[use.output] = {element_of(state->dtype), shape};
    }
    size_t count = 0;
    ort.check(ort.SessionGetInputCount(session, &count), path);
    check_side(ort, session, path, "input", inputs, count, ort.SessionGetInputName, ort.SessionGetInputTypeInfo);
    ort.check(ort.SessionGetOutputCount(session, &count), path);
    check_side(ort, session, path, "output", outputs, count, ort.SessionGetOutputName, ort.SessionGetOutputTypeInfo);
}

}  // namespace framestep
