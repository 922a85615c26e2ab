// Compiled graphs over device buffers, a frame being one launch of a CUDA graph and one wait, as runtime/engines/tensorrt.py
// has it. Compiled against TensorRT's public headers; TensorRT itself and the driver are loaded at run time.
//
// A state's input and output are bound to the same memory, which TensorRT's KV-cache layer updates in place; a state that
// some graph updates otherwise has a second buffer, and is copied back within the step. The upload of frames and positions
// from pinned memory, all graphs and the download of the asked outputs are captured once for each range of slots. Outputs
// that nobody asked for stay on the device.
#include "tensorrt_engine.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "cuda_driver.h"
#include "log.h"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 15)
#error "TensorRT 10.15 is the first that updates a KV cache in place"
#endif

namespace framestep {
namespace {

using nvinfer1::DataType;

constexpr const char* FLAVOUR = "tensorrt";
constexpr size_t ALIGNMENT = 256;   // bytes; what TensorRT asks of an address, and what the driver gives
constexpr size_t MOST_GRAPHS = 64;  // captured ranges of slots that are kept
constexpr int WARM_UPS = 2;         // runs before a capture: TensorRT sets itself up for new shapes in the first one

// Where engines and contexts come and go TensorRT may wait for the whole device, which breaks a capture in any thread.
std::mutex& alone() {
    static auto& lock = *new std::mutex;
    return lock;
}

// TensorRT's library, loaded once and never unloaded.
struct Library {
    std::string path;
    std::string version;  // "10.16.2.10"
    void* (*create_runtime)(void* logger, int32_t version) = nullptr;
};

Library load(void* library, const std::string& place) {
    const auto find = [&](const char* name) {
        void* symbol = dlsym(library, name);
        if (symbol == nullptr) throw Error(FS_ERROR_ENGINE, place + ": is not TensorRT: " + name + " is missing");
        return symbol;
    };
    Library loaded;
    loaded.path = place;
    loaded.create_runtime = reinterpret_cast<decltype(loaded.create_runtime)>(find("createInferRuntime_INTERNAL"));
    int first = 0;
    for (const char* part : {"Major", "Minor", "Patch", "Build"}) {
        const std::string name = std::string("getInferLib") + part + "Version";
        const int number = reinterpret_cast<int32_t (*)()>(find(name.c_str()))();
        if (loaded.version.empty()) first = number;
        loaded.version += (loaded.version.empty() ? "" : ".") + std::to_string(number);
    }
    if (first != NV_TENSORRT_MAJOR) {
        throw Error(FS_ERROR_ENGINE, place + ": is TensorRT " + loaded.version + ", and this library was built for " +
                                         std::to_string(NV_TENSORRT_MAJOR));
    }
    return loaded;
}

const Library& load_library(const std::string& path) {
    static std::mutex lock;
    static auto& loaded = *new std::map<std::string, Library>;  // never freed: TensorRT's threads may outlive it
    const std::string place = path.empty() ? "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR) : path;
    const std::lock_guard guard(lock);
    const auto found = loaded.find(place);
    if (found != loaded.end()) return found->second;
    void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* reason = dlerror();
        throw Error(FS_ERROR_ENGINE, "TensorRT's library cannot be loaded: " + std::string(reason == nullptr ? place : reason) +
                                         "; install TensorRT, or give its path as the option 'library'");
    }
    return loaded.emplace(place, load(library, place)).first->second;
}

// What TensorRT says: warnings and errors go to the log, and the last error is kept for a message of ours.
class Messages : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kWARNING) return;
        try {
            std::string line = message;
            std::replace(line.begin(), line.end(), '\n', ' ');
            framestep::log(severity == Severity::kWARNING ? FS_LOG_WARNING : FS_LOG_ERROR, "TensorRT: " + line);
            const std::lock_guard guard(lock_);
            if (severity < Severity::kWARNING) last_error_ = line.substr(0, 400);
        } catch (const std::exception&) {  // no memory for a message
        }
    }

    std::string last_error() const {
        const std::lock_guard guard(lock_);
        return last_error_.empty() ? "it gave no reason" : last_error_;
    }

private:
    mutable std::mutex lock_;
    std::string last_error_;
};

DataType type_of(fs_dtype dtype) {
    switch (dtype) {
        case FS_UINT8: return DataType::kUINT8;
        case FS_INT8: return DataType::kINT8;
        case FS_INT32: return DataType::kINT32;
        case FS_INT64: return DataType::kINT64;
        case FS_BOOL: return DataType::kBOOL;
        case FS_FLOAT16: return DataType::kHALF;
        case FS_FLOAT32: return DataType::kFLOAT;
    }
    return DataType::kFLOAT;
}

nvinfer1::Dims dims_of(const std::vector<int64_t>& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

// The device's memory of a tensor. Its first axis is that of the slots where it has a row for each.
struct Buffer {
    DeviceMemory memory;
    std::vector<int64_t> shape;
    fs_dtype dtype = FS_FLOAT32;

    size_t row() const {  // bytes of a slot
        size_t total = bytes_of(dtype);
        for (size_t axis = 1; axis < shape.size(); ++axis) total *= static_cast<size_t>(shape[axis]);
        return total;
    }
    size_t bytes() const { return shape.empty() ? bytes_of(dtype) : static_cast<size_t>(shape[0]) * row(); }
    CUdeviceptr at(int64_t slot) const { return memory.address() + static_cast<size_t>(slot) * row(); }
};

// A graph's engine. What it was made of lives as long as it.
struct Loaded {
    const Graph* graph;
    const EngineFile* file;
    std::unique_ptr<Messages> messages;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::vector<size_t> copied;  // states that it does not update in place, by their place in the plan
};

// A range of slots: the contexts of its graphs, which the captured graph keeps using.
struct Range {
    std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> contexts;
    CudaGraph graph;
    uint64_t used = 0;
};

class TensorRtEngine : public Engine {
public:
    TensorRtEngine(const Bundle& bundle, const Manifest& manifest, const Plan& plan, const EngineOptions& options)
        : library_(load_library(options.library)), plan_(plan), streams_(options.streams) {
        try {
            const std::lock_guard guard(alone());
            open(bundle, manifest);
        } catch (...) {
            release();
            throw;
        }
    }

    ~TensorRtEngine() override { release(); }

    const char* name() const override { return "tensorrt"; }
    std::string library() const override { return library_.path; }
    std::string library_version() const override { return library_.version; }
    uint8_t* frame(int slot) override { return frames_.data() + static_cast<size_t>(slot) * frame_bytes_; }
    int64_t* positions() override { return reinterpret_cast<int64_t*>(positions_.data()); }
    const std::vector<Output>& outputs() const override { return outputs_; }
    uintptr_t state_address(size_t index) const override { return static_cast<uintptr_t>(states_[index].at(0)); }

    void set_labels(const LabelInputs& labels) override {
        const auto count = static_cast<int64_t>(labels.count);
        for (const Loaded& one : loaded_) {
            if (one.file->labels > 0 && count > one.file->labels) {
                throw Error(FS_ERROR_ENGINE, std::to_string(count) + " labels are more than the " +
                                                 std::to_string(one.file->labels) + " that the engine " + one.file->file + " takes");
            }
        }
        const std::lock_guard guard(alone());
        const Cuda::Current current(cuda_);
        std::map<std::string, Buffer> made;
        const auto put = [&](const char* role, std::vector<int64_t> shape, const float* values) {
            Buffer one = buffer(std::move(shape), FS_FLOAT32, std::string("the input '") + role + "'");
            cuda_.upload(one.at(0), values, one.bytes());
            cuda_.wait();
            made[role] = std::move(one);
        };
        put("text_embeddings", {count, static_cast<int64_t>(labels.text_hidden)}, labels.text_embeddings.data());
        put("patch_text_embeddings", {count, static_cast<int64_t>(labels.patch_text_hidden)},
            labels.patch_text_embeddings.data());
        put("logit_scale", {}, &labels.logit_scale);
        put("logit_bias", {}, &labels.logit_bias);
        allocate_outputs(count);
        labels_ = std::move(made);
    }

    void run(int first, int stop) override {
        if (!broken_.empty()) throw Error(FS_ERROR_ENGINE, broken_);
        try {
            const Cuda::Current current(cuda_);
            Range& range = captured(first, stop);
            range.used = ++launches_;
            range.graph.launch();
            cuda_.wait();
        } catch (const DeviceLost& error) {
            broken_ = error.message;
            throw;
        }
    }

    void read_state(size_t index, int slot, void* out) override {
        const Cuda::Current current(cuda_);
        cuda_.download(out, states_[index].at(slot), states_[index].row());
        cuda_.wait();
    }

    void write_state(size_t index, int slot, const void* data) override {
        const Cuda::Current current(cuda_);
        cuda_.upload(states_[index].at(slot), data, states_[index].row());
        cuda_.wait();
    }

    void zero_state(size_t index, int slot) override {
        const Cuda::Current current(cuda_);
        cuda_.zero(states_[index].at(slot), states_[index].row());
        cuda_.wait();
    }

private:
    void open(const Bundle& bundle, const Manifest& manifest) {
        const Cuda::Current current(cuda_);
        const Target target{FLAVOUR, library_.version, cuda_.compute_capability()};
        for (const Graph* graph : plan_.graphs) loaded_.push_back(load_graph(bundle, manifest, *graph, target));
        frame_bytes_ = size_t{3} * static_cast<size_t>(bundle.height) * static_cast<size_t>(bundle.width);
        frames_ = PinnedMemory(cuda_, static_cast<size_t>(streams_) * frame_bytes_);
        positions_ = PinnedMemory(cuda_, static_cast<size_t>(streams_) * sizeof(int64_t));
        inputs_["frame"] = buffer({streams_, bundle.height, bundle.width, 3}, FS_UINT8, "frames");
        inputs_["position"] = buffer({streams_}, FS_INT64, "positions");
        spares_.resize(plan_.states.size());
        for (size_t index = 0; index < plan_.states.size(); ++index) {
            const State& state = *plan_.states[index];
            std::vector<int64_t> shape = {streams_};
            shape.insert(shape.end(), state.shape.begin(), state.shape.end());
            states_.push_back(buffer(shape, state.dtype, "the state '" + state.name + "'"));
            const bool copied = std::any_of(loaded_.begin(), loaded_.end(), [&](const Loaded& one) {
                return std::find(one.copied.begin(), one.copied.end(), index) != one.copied.end();
            });
            if (copied) spares_[index] = buffer(shape, state.dtype, "a second copy of the state '" + state.name + "'");
        }
        int64_t scratch = 1;  // one for all: they run in turns
        for (const Loaded& one : loaded_) scratch = std::max(scratch, one.engine->getDeviceMemorySizeV2());
        scratch_ = buffer({scratch}, FS_UINT8, "TensorRT's activations");
        allocate_outputs(0);
    }

    // TensorRT's objects, before the memory that they use.
    void release() noexcept {
        const std::lock_guard guard(alone());
        cuda_.give_back([this] {
            ranges_.clear();
            loaded_.clear();
        });
    }

    Loaded load_graph(const Bundle& bundle, const Manifest& manifest, const Graph& graph, const Target& target) const {
        const EngineFile& file = find_engine(bundle, manifest, graph, target, static_cast<int>(streams_));
        const std::unique_ptr<MappedFile> mapped = read_engine(bundle, file);
        const std::string_view content = mapped->bytes();
        const std::string where = (bundle.path / file.file).string();
        Loaded made{&graph, &file, std::make_unique<Messages>(), nullptr, nullptr, {}};
        made.runtime.reset(static_cast<nvinfer1::IRuntime*>(library_.create_runtime(made.messages.get(), NV_TENSORRT_VERSION)));
        if (made.runtime != nullptr) {
            // an engine for later versions brings the runtime of its own version along
            made.runtime->setEngineHostCodeAllowed(file.version_compatible);
            made.engine.reset(made.runtime->deserializeCudaEngine(content.data(), content.size()));
        }
        if (made.engine == nullptr) {
            throw Error(FS_ERROR_ENGINE, where + ": TensorRT " + library_.version + " cannot load it (" +
                                             std::to_string(content.size()) + " bytes of engine, " +
                                             std::to_string(cuda_.free_bytes()) + " bytes free on the GPU): " +
                                             made.messages->last_error());
        }
        check_engine(where, *made.engine, graph);
        for (const StateUse& use : graph.states) {
            if (use.output.empty()) continue;
            const char* aliased = made.engine->getAliasedInputTensor(use.output.c_str());
            if (aliased == nullptr || use.input != aliased) made.copied.push_back(state_index(use.state));
        }
        return made;
    }

    // Buffers are bound by the manifest alone: compare it with the engine.
    void check_engine(const std::string& where, const nvinfer1::ICudaEngine& engine, const Graph& graph) const {
        std::map<std::string, DataType> declared, found;
        for (const Port& port : graph.inputs) declared[port.name] = type_of(port.dtype);
        for (const Port& port : graph.outputs) declared[port.name] = type_of(port.dtype);
        for (const StateUse& use : graph.states) {
            const DataType type = type_of(plan_.states[state_index(use.state)]->dtype);
            declared[use.input] = type;
            if (!use.output.empty()) declared[use.output] = type;
        }
        for (int32_t index = 0; index < engine.getNbIOTensors(); ++index) {
            const char* name = engine.getIOTensorName(index);
            found[name] = engine.getTensorDataType(name);
        }
        const auto difference = std::mismatch(declared.begin(), declared.end(), found.begin(), found.end());
        if (difference.first == declared.end() && difference.second == found.end()) return;
        const bool extra = difference.first == declared.end() ||
                           (difference.second != found.end() && difference.second->first < difference.first->first);
        const std::string& name = extra ? difference.second->first : difference.first->first;
        const char* what = extra ? "absent in the manifest" : found.count(name) == 0 ? "absent in the engine" : "of another type";
        throw Error(FS_ERROR_ENGINE, where + ": '" + name + "' is " + what + "; build the engine again");
    }

    size_t state_index(const std::string& name) const {
        const auto found = std::find_if(plan_.states.begin(), plan_.states.end(),
                                        [&](const State* state) { return state->name == name; });
        return static_cast<size_t>(found - plan_.states.begin());
    }

    Buffer buffer(std::vector<int64_t> shape, fs_dtype dtype, const std::string& what) const {
        Buffer made;
        made.shape = std::move(shape);
        made.dtype = dtype;
        made.memory = DeviceMemory(cuda_, made.bytes(), what);
        return made;
    }

    // Room for what every graph gives; captured ranges have the old addresses and go.
    void allocate_outputs(int64_t labels) {
        std::map<std::string, Buffer> values;
        for (const Graph* graph : plan_.graphs) {
            for (const Port& port : graph->outputs) {
                std::vector<int64_t> shape;
                for (const Dim& dim : port.shape) {
                    if (dim.symbol == 'B' || dim.symbol == 'T') {
                        throw Error(FS_ERROR_BUNDLE, "output '" + port.name + "' has an axis that no frame gives a size");
                    }
                    shape.push_back(dim.symbol == 'S' ? streams_ : dim.symbol == 'C' ? labels : dim.size);
                }
                values[port.name] = buffer(shape, port.dtype, "the output '" + port.name + "'");
            }
        }
        std::vector<PinnedMemory> hosts;
        std::vector<Output> outputs;
        for (const Port* port : plan_.outputs) {
            const Buffer& value = values.at(port->name);
            hosts.emplace_back(cuda_, value.bytes());
            outputs.push_back({port->name, value.dtype, {value.shape.begin() + 1, value.shape.end()}, value.row(),
                               hosts.back().data()});
        }
        ranges_.clear();
        values_ = std::move(values);
        hosts_ = std::move(hosts);
        outputs_ = std::move(outputs);
    }

    Range& captured(int first, int stop) {
        const std::pair<int, int> key(first, stop);
        const auto known = ranges_.find(key);
        if (known != ranges_.end()) return known->second;
        const std::lock_guard guard(alone());
        if (ranges_.size() >= MOST_GRAPHS) {
            ranges_.erase(std::min_element(ranges_.begin(), ranges_.end(), [](const auto& one, const auto& other) {
                return one.second.used < other.second.used;
            }));
        }
        const int start = first_aligned(first);
        Range range;
        for (const Loaded& one : loaded_) range.contexts.push_back(context(one, start, stop));
        // A step may run twice on the same frame: it writes the same slot with the same keys and values.
        for (int warm_up = 0; warm_up < WARM_UPS; ++warm_up) put_step(range, first, stop, start);
        cuda_.wait();
        range.graph = CudaGraph(cuda_, [&] { put_step(range, first, stop, start); });
        return ranges_.emplace(key, std::move(range)).first->second;
    }

    std::unique_ptr<nvinfer1::IExecutionContext> context(const Loaded& one, int start, int stop) const {
        const std::string where = one.file->file + ": TensorRT ";
        std::unique_ptr<nvinfer1::IExecutionContext> made(
            one.engine->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
        if (made == nullptr) throw Error(FS_ERROR_ENGINE, where + "made no context: " + one.messages->last_error());
        made->setDeviceMemoryV2(reinterpret_cast<void*>(scratch_.at(0)), static_cast<int64_t>(scratch_.bytes()));
        const auto bind = [&](const std::string& name, CUdeviceptr address) {
            if (made->setTensorAddress(name.c_str(), reinterpret_cast<void*>(address))) return;
            throw Error(FS_ERROR_ENGINE, where + "refused the buffer of '" + name + "': " + one.messages->last_error());
        };
        const auto bind_input = [&](const std::string& name, CUdeviceptr address, std::vector<int64_t> shape, bool of_slots) {
            if (of_slots) shape[0] = stop - start;
            if (!made->setInputShape(name.c_str(), dims_of(shape))) {
                throw Error(FS_ERROR_ENGINE, where + "refused the shape of '" + name + "': " + one.messages->last_error());
            }
            bind(name, address);
        };
        for (const Port& port : one.graph->inputs) {
            const Buffer& value = input(port);
            bind_input(port.name, value.at(0), value.shape, !port.shape.empty() && port.shape[0].symbol == 'S');
        }
        for (const Port& port : one.graph->outputs) bind(port.name, values_.at(port.name).at(0));
        for (const StateUse& use : one.graph->states) {
            const size_t index = state_index(use.state);
            const bool copied = std::find(one.copied.begin(), one.copied.end(), index) != one.copied.end();
            bind_input(use.input, states_[index].at(start), states_[index].shape, true);
            if (!use.output.empty()) bind(use.output, (copied ? spares_ : states_)[index].at(start));
        }
        if (made->inferShapes(0, nullptr) != 0) {
            throw Error(FS_ERROR_ENGINE, where + "wants more shapes than the manifest has: " + one.messages->last_error());
        }
        return made;
    }

    // From the host's inputs to the host's outputs; nothing of it waits.
    void put_step(const Range& range, int first, int stop, int start) {
        const auto rows = static_cast<size_t>(stop - start);
        cuda_.upload(inputs_.at("frame").at(0), frame(start), rows * frame_bytes_);
        cuda_.upload(inputs_.at("position").at(0), positions() + start, rows * sizeof(int64_t));
        for (size_t index = 0; index < loaded_.size(); ++index) {
            const Loaded& one = loaded_[index];
            if (!range.contexts[index]->enqueueV3(cuda_.stream())) {
                throw Error(FS_ERROR_ENGINE, one.file->file + ": TensorRT failed in a step: " + one.messages->last_error());
            }
            for (const size_t state : one.copied) {
                cuda_.copy(states_[state].at(start), spares_[state].at(start), rows * states_[state].row());
            }
        }
        for (size_t index = 0; index < outputs_.size(); ++index) {  // not of the slots before `first`: someone may read them
            const Buffer& value = values_.at(outputs_[index].name);
            cuda_.download(hosts_[index].data() + static_cast<size_t>(first) * value.row(), value.at(first - start),
                           static_cast<size_t>(stop - first) * value.row());
        }
    }

    // The first slot to run: TensorRT wants aligned addresses, and an idle slot in the range does no harm.
    int first_aligned(int first) const {
        const auto aligned = [&](const Buffer& state) { return static_cast<size_t>(first) * state.row() % ALIGNMENT == 0; };
        while (!std::all_of(states_.begin(), states_.end(), aligned)) --first;
        return first;
    }

    const Buffer& input(const Port& port) const {
        if (port.role == "output") return values_.at(port.name);
        const auto fed = inputs_.find(port.role);
        if (fed != inputs_.end()) return fed->second;
        const auto found = labels_.find(port.role);
        if (found == labels_.end()) {
            throw Error(FS_ERROR_ENGINE, "input '" + port.name +
                                               "' needs labels; set them before the first step, or add them to the bundle"
                                               " with 'framestep label'");
        }
        return found->second;
    }

    const Library& library_;
    const Plan plan_;
    const int64_t streams_;
    const Cuda cuda_;  // after it all that is freed with it
    size_t frame_bytes_ = 0;
    PinnedMemory frames_;     // uint8 [streams, height, width, 3]
    PinnedMemory positions_;  // int64 [streams]
    std::map<std::string, Buffer> inputs_;  // their twins on the device, by role
    std::vector<Buffer> states_;            // as in the plan
    std::vector<Buffer> spares_;            // of those that are not updated in place
    Buffer scratch_;
    std::map<std::string, Buffer> labels_;  // by role
    std::map<std::string, Buffer> values_;  // outputs of graphs by name
    std::vector<PinnedMemory> hosts_;       // of the outputs
    std::vector<Output> outputs_;           // as in the plan
    std::vector<Loaded> loaded_;            // as in the plan
    std::map<std::pair<int, int>, Range> ranges_;  // of slots
    uint64_t launches_ = 0;
    std::string broken_;  // why, once the device is lost
};

}  // namespace

Target tensorrt_target(const std::string& library) {
    const Library& loaded = load_library(library);
    const Cuda cuda;
    return {FLAVOUR, loaded.version, cuda.compute_capability()};
}

std::unique_ptr<Engine> make_tensorrt_engine(const Bundle& bundle, const Manifest& manifest, const Plan& plan,
                                             const EngineOptions& options) {
    return std::make_unique<TensorRtEngine>(bundle, manifest, plan, options);
}

}  // namespace framestep
