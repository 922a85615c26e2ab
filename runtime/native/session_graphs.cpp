// A session's graphs that run by themselves.
#include <algorithm>

#include "finite.h"
#include "session.h"

namespace framestep {
namespace {

// Sizes of the axes of any size, by symbol. Throws where a tensor is not what the port takes.
void match_shape(const Graph& graph, const Port& port, const NamedTensor& given, std::map<char, int64_t>& sizes) {
    const std::vector<int64_t>& shape = given.tensor.shape;
    bool fits = given.dtype == port.dtype && shape.size() == port.shape.size();
    for (size_t axis = 0; fits && axis < shape.size(); ++axis) {
        const Dim& dim = port.shape[axis];
        fits = dim.symbol == 0 ? shape[axis] == dim.size : sizes.emplace(dim.symbol, shape[axis]).first->second == shape[axis];
        fits &= shape[axis] >= 1 && shape[axis] <= INT32_MAX;
    }
    if (fits) return;
    const auto text = [](const auto& item) { return item.symbol != 0 ? std::string(1, item.symbol) : std::to_string(item.size); };
    std::string expected, found;
    for (const Dim& dim : port.shape) {
        if (dim.symbol != 'S') expected += (expected.empty() ? "" : ", ") + text(dim);
    }
    const size_t first = !port.shape.empty() && port.shape[0].symbol == 'S' ? 1 : 0;
    for (size_t axis = first; axis < shape.size(); ++axis) found += (axis == first ? "" : ", ") + std::to_string(shape[axis]);
    throw Error(FS_ERROR_ARGUMENT, "graph '" + graph.name + "': input '" + port.name + "' takes " + name_of(port.dtype) +
                                       " [" + expected + "], found " + name_of(given.dtype) + " [" + found + "]");
}

}  // namespace

fs_status Session::run(fs_stream stream, size_t index, const std::vector<NamedTensor>& inputs) {
    if (index >= plan_.graphs.size()) {
        throw Error(FS_ERROR_ARGUMENT,
                    "graph " + std::to_string(index) + ": this session has " + std::to_string(plan_.graphs.size()));
    }
    const Graph& graph = *plan_.graphs[index];
    std::map<char, int64_t> sizes;
    std::vector<HostTensor> tensors;
    for (const Port& port : graph.inputs) {
        const auto given = std::find_if(inputs.begin(), inputs.end(),
                                        [&](const NamedTensor& tensor) { return tensor.name == port.name; });
        if (given == inputs.end()) {
            throw Error(FS_ERROR_ARGUMENT, "graph '" + graph.name + "': the input '" + port.name + "' is missing");
        }
        NamedTensor whole = *given;
        if (!port.shape.empty() && port.shape[0].symbol == 'S') whole.tensor.shape.insert(whole.tensor.shape.begin(), 1);
        match_shape(graph, port, whole, sizes);
        if (reinterpret_cast<uintptr_t>(whole.tensor.data) % bytes_of(port.dtype) != 0) {
            throw Error(FS_ERROR_ARGUMENT, "graph '" + graph.name + "': input '" + port.name + "' is not aligned to its numbers");
        }
        tensors.push_back(std::move(whole.tensor));
    }
    for (const NamedTensor& given : inputs) {
        const auto same = [&](const auto& other) { return other.name == given.name; };
        if (std::none_of(graph.inputs.begin(), graph.inputs.end(), same)) {
            throw Error(FS_ERROR_ARGUMENT, "graph '" + graph.name + "': has no input '" + given.name + "'");
        }
        if (std::count_if(inputs.begin(), inputs.end(), same) > 1) {
            throw Error(FS_ERROR_ARGUMENT, "graph '" + graph.name + "': input '" + given.name + "' stands twice");
        }
    }
    std::vector<std::vector<int64_t>> shapes;
    for (const Port& port : graph.outputs) {
        shapes.emplace_back();
        for (const Dim& dim : port.shape) {
            const auto size = dim.symbol == 'S' ? sizes.end() : sizes.find(dim.symbol);
            if (dim.symbol != 0 && dim.symbol != 'S' && size == sizes.end()) {
                throw Error(FS_ERROR_BUNDLE, "output '" + port.name + "' has an axis that no input gives a size");
            }
            shapes.back().push_back(dim.symbol == 0 ? dim.size : dim.symbol == 'S' ? 1 : size->second);
        }
    }
    const std::lock_guard guard(lane(index));
    if (closed()) throw Error(FS_ERROR_HANDLE, "this session is closed");
    const int slot = slot_of(stream);
    RunResult& result = slots_[slot]->runs[index];
    result.generation.store(0, std::memory_order_release);
    engine_->run_graph(index, slot, tensors, shapes);
    bool bad = false;
    for (size_t output = 0; output < shapes.size(); ++output) {
        size_t bytes = bytes_of(graph.outputs[output].dtype);
        for (const int64_t size : shapes[output]) bytes *= static_cast<size_t>(size);
        bad |= !all_finite(engine_->graph_output(index, slot, output), bytes, graph.outputs[output].dtype);
    }
    result.shapes = std::move(shapes);
    result.generation.store(generations_.fetch_add(1, std::memory_order_relaxed) + 1, std::memory_order_release);
    if (!bad) return FS_OK;
    for (const size_t state : written_[index]) engine_->zero_state(state, slot);
    return FS_ERROR_NONFINITE;
}

void Session::run_output(fs_stream stream, size_t index, size_t output, fs_tensor& tensor) {
    if (index >= plan_.graphs.size() || output >= plan_.graphs[index]->outputs.size()) {
        throw Error(FS_ERROR_ARGUMENT, "graph " + std::to_string(index) + " has no output " + std::to_string(output));
    }
    const Port& port = plan_.graphs[index]->outputs[output];
    const std::lock_guard guard(lane(index));
    if (closed()) throw Error(FS_ERROR_HANDLE, "this session is closed");
    const int slot = slot_of(stream);
    const RunResult& result = slots_[slot]->runs[index];
    tensor.generation = result.generation.load(std::memory_order_acquire);
    if (tensor.generation == 0) {
        throw Error(FS_ERROR_STALE, "graph '" + plan_.graphs[index]->name + "': was not run for this stream yet");
    }
    const std::vector<int64_t>& shape = result.shapes[output];
    const size_t first = !port.shape.empty() && port.shape[0].symbol == 'S' ? 1 : 0;
    tensor.data = engine_->graph_output(index, slot, output);
    tensor.dtype = port.dtype;
    tensor.rank = static_cast<int32_t>(shape.size() - first);
    std::copy(shape.begin() + static_cast<std::ptrdiff_t>(first), shape.end(), tensor.shape);
    tensor.bytes = bytes_of(port.dtype);
    for (const int64_t size : shape) tensor.bytes *= static_cast<size_t>(size);
}

}  // namespace framestep
