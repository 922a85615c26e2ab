// Step graphs on ONNX Runtime's C API over bound buffers.
//
// A state's output is bound to the memory of its input, so `TensorScatter` writes only the new slot. (ONNX Runtime says
// `in-place optimization not activated` in its log when it had to copy; that would be a bug here.)
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "engine.h"
#include "ort_memory.h"
#include "ort_ports.h"
#include "ort_session.h"
#include "own_operators.h"

namespace framestep {
namespace {

constexpr size_t MOST_BINDINGS = 1024;  // ranges of slots that stay bound: all of 44 streams'

class OnnxRuntimeEngine : public Engine {
public:
    OnnxRuntimeEngine(const Bundle& bundle, const Manifest& manifest, const Plan& plan, const EngineOptions& options)
        : ort_(load_ort(options.library)), options_(options), plan_(plan), memory_info_(ort_.ReleaseMemoryInfo),
          device_info_(ort_.ReleaseMemoryInfo), device_allocator_(ort_.ReleaseAllocator), streams_(options.streams) {
        const bool cuda = options.device == "cuda";
        ort_.check(ort_.CreateMemoryInfo("Cpu", ORT_DEVICE_ALLOCATOR, 0, ORT_MEMORY_DEFAULT, memory_info_.into()), "host");
        const bool integer = manifest.precision.find("int8") != std::string::npos;
        const Owned<OrtSessionOptions> session = session_options(ort_, options, integer);
        const bool ours = !cuda && options.engine != PLAIN;
        if (ours) {
            const std::string what = "ONNX Runtime could not take an operator";
            operators_ = std::make_unique<OwnOperators>(ort_);
            ort_.check(ort_.AddCustomOpDomain(session.get(), operators_->domain()), what);
            ort_.check(ort_.AddSessionConfigEntry(session.get(), "session.model_external_initializers_file_folder_path",
                                                  bundle.path.c_str()), what);
        }
        for (const Graph* graph : plan.graphs) {
            const std::string path = (bundle.path / graph->file).string();
            sessions_.emplace_back(ort_.ReleaseSession);
            const DerivedGraph derived = ours ? operators_->derive(bundle, manifest, *graph, options.engine == BFLOAT16)
                                              : DerivedGraph();
            own_operators_.push_back(derived.operators);
            if (integer_states(*graph, manifest) > derived.integer_rings) {
                throw Error(FS_ERROR_ENGINE, path + ": keeps its memory as INT8, which ONNX Runtime would dequantize as a whole"
                                             " in every step: its attention is none that framestep has an operator for; use"
                                             " the engine 'torch' or another precision");
            }
            ort_.check(derived.model.empty()
                           ? ort_.CreateSession(ort_.env, path.c_str(), session.get(), sessions_.back().into())
                           : ort_.CreateSessionFromArray(ort_.env, derived.model.data(), derived.model.size(), session.get(),
                                                         sessions_.back().into()),
                       path + ": ONNX Runtime " + ort_.version + " cannot load it");
            check_ports(ort_, sessions_.back().get(), path, *graph, manifest);
        }
        if (options.engine == BFLOAT16 && !operators_->has_bfloat16()) {
            throw Error(FS_ERROR_ENGINE, bundle.path.string() + ": has nothing that the engine '" + BFLOAT16 +
                                             "' computes in bfloat16, which is MatMul or Gemm with a constant matrix of"
                                             " float32; use the engine 'onnxruntime'");
        }
        if (cuda) {
            ort_.check(ort_.CreateMemoryInfo("Cuda", ORT_DEVICE_ALLOCATOR, 0, ORT_MEMORY_DEFAULT, device_info_.into()),
                       "CUDA");
            ort_.check(ort_.CreateAllocator(sessions_.front().get(), device_info_.get(), device_allocator_.into()), "CUDA");
        }
        const auto host = [&](std::vector<int64_t> shape, fs_dtype dtype) { return allocate(shape, dtype, true, false); };
        frames_ = host({streams_, bundle.height, bundle.width, 3}, FS_UINT8);
        positions_ = host({streams_}, FS_INT64);
        for (const State* state : plan.states) {
            std::vector<int64_t> shape = {streams_};
            shape.insert(shape.end(), state->shape.begin(), state->shape.end());
            states_.push_back(allocate(shape, state->dtype, true, cuda));
        }
        if (cuda) {
            for (const State* state : plan.states) make_copier(state->dtype);
            for (int slot = 0; slot < streams_; ++slot) {
                for (size_t index = 0; index < states_.size(); ++index) zero_state(index, slot);
            }
        }
        runs_.resize(plan.graphs.size());
        for (std::vector<Run>& slots : runs_) slots.resize(static_cast<size_t>(streams_));
        allocate_outputs(0);
    }

    const char* name() const override { return options_.engine.c_str(); }
    std::string library() const override { return ort_.path; }
    std::string library_version() const override { return ort_.version; }
    uint8_t* frame(int slot) override { return frames_.memory.data() + slot * frames_.row(); }
    int64_t* positions() override { return reinterpret_cast<int64_t*>(positions_.memory.data()); }
    const std::vector<Output>& outputs() const override { return outputs_; }
    uintptr_t state_address(size_t index) const override {
        return reinterpret_cast<uintptr_t>(states_[index].memory.data());
    }

    void set_labels(const LabelInputs& labels) override {
        std::map<std::string, Buffer> made;
        const auto put = [&](const char* role, std::vector<int64_t> shape, const float* values) {
            Buffer buffer = allocate(shape, FS_FLOAT32, false, false);
            std::memcpy(buffer.memory.data(), values, buffer.memory.bytes());
            made.emplace(role, std::move(buffer));
        };
        const int64_t count = static_cast<int64_t>(labels.count);
        put("text_embeddings", {count, static_cast<int64_t>(labels.text_hidden)}, labels.text_embeddings.data());
        put("patch_text_embeddings", {count, static_cast<int64_t>(labels.patch_text_hidden)},
            labels.patch_text_embeddings.data());
        put("logit_scale", {}, &labels.logit_scale);
        put("logit_bias", {}, &labels.logit_bias);
        allocate_outputs(count);  // may fail: nothing has changed then
        labels_ = std::move(made);
    }

    void run(int first, int stop) override {
        auto found = bindings_.find({first, stop});
        if (found == bindings_.end()) {
            std::vector<Binding> made = bind(first, stop);
            if (bindings_.size() >= MOST_BINDINGS) bindings_.clear();
            found = bindings_.emplace(std::pair(first, stop), std::move(made)).first;
        }
        for (size_t index = 0; index < found->second.size(); ++index) {
            const Binding& binding = found->second[index];
            for (const HostInput& input : binding.copied) {  // a binding copies to the device when it is made, not in a run
                ort_.check(ort_.BindInput(binding.binding.get(), input.name, input.value), "ONNX Runtime failed in a step");
            }
            ort_.check(ort_.RunWithBinding(sessions_[index].get(), nullptr, binding.binding.get()),
                       "ONNX Runtime failed in a step");
        }
    }

    void read_state(size_t index, int slot, void* out) override {
        const Buffer& state = states_[index];
        uint8_t* place = state.memory.data() + slot * state.row();
        if (state.on_device) {
            copy(state, place, out, false);
        } else {
            std::memcpy(out, place, state.row());
        }
    }

    void write_state(size_t index, int slot, const void* data) override {
        const Buffer& state = states_[index];
        uint8_t* place = state.memory.data() + slot * state.row();
        if (state.on_device) {
            copy(state, place, const_cast<void*>(data), true);
        } else {
            std::memcpy(place, data, state.row());
        }
    }

    void zero_state(size_t index, int slot) override {
        const Buffer& state = states_[index];
        if (state.on_device) {
            const std::vector<uint8_t> zeros(state.row());
            write_state(index, slot, zeros.data());
        } else {
            std::memset(state.memory.data() + slot * state.row(), 0, state.row());
        }
    }

    size_t own_operators(size_t graph) const override { return own_operators_[graph]; }
    bool runs_graphs() const override { return true; }

    void run_graph(size_t index, int slot, const std::vector<HostTensor>& inputs,
                   const std::vector<std::vector<int64_t>>& outputs) override {
        Run& run = runs_[index][slot];
        if (run.binding.get() == nullptr) run = bind_states(index, slot);
        try {
            run_bound(index, run, inputs, outputs);
        } catch (...) {
            run = Run();  // it may be half bound
            throw;
        }
    }

    const uint8_t* graph_output(size_t index, int slot, size_t output) const override {
        return runs_[index][slot].outputs[output].memory.data();
    }

private:
    struct Run {  // of one graph for one slot
        std::vector<Owned<OrtValue>> states;
        Owned<OrtIoBinding> binding;
        std::vector<Buffer> outputs;
    };
    struct HostInput {
        const char* name;
        const OrtValue* value;
    };
    struct Binding {
        std::vector<Owned<OrtValue>> values;
        Owned<OrtIoBinding> binding;
        std::vector<HostInput> copied;  // inputs that lie on the host while the graph runs on a device
    };

    static size_t bytes_of_tensor(const std::vector<int64_t>& shape, fs_dtype dtype) {
        size_t bytes = bytes_of(dtype);
        for (const int64_t size : shape) {
            if (__builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes)) bytes = SIZE_MAX - ALIGNMENT;
        }
        return bytes;
    }

    Buffer allocate(const std::vector<int64_t>& shape, fs_dtype dtype, bool of_slots, bool on_device) const {
        const size_t bytes = bytes_of_tensor(shape, dtype);
        Buffer buffer;
        buffer.memory = on_device ? Memory(ort_, device_allocator_.get(), bytes) : Memory(bytes);
        buffer.shape = shape;
        buffer.dtype = dtype;
        buffer.of_slots = of_slots;
        buffer.on_device = on_device;
        return buffer;
    }

    // Room for what every graph gives. What nobody asked for stays where it was computed.
    void allocate_outputs(int64_t labels) {
        std::map<std::string, Buffer> values;
        for (size_t index = 0; index < plan_.step_graphs; ++index) {
            for (const Port& port : plan_.graphs[index]->outputs) {
                std::vector<int64_t> shape;
                for (const Dim& dim : port.shape) {
                    if (dim.symbol == 'B' || dim.symbol == 'T') {
                        throw Error(FS_ERROR_BUNDLE, "output '" + port.name + "' has an axis that no frame gives a size");
                    }
                    shape.push_back(dim.symbol == 'S' ? streams_ : dim.symbol == 'C' ? labels : dim.size);
                }
                const bool asked = std::find(plan_.outputs.begin(), plan_.outputs.end(), &port) != plan_.outputs.end();
                const bool of_slots = !port.shape.empty() && port.shape[0].symbol == 'S';
                values.emplace(port.name, allocate(shape, port.dtype, of_slots, options_.device == "cuda" && !asked));
            }
        }
        std::vector<Output> outputs;
        for (const Port* port : plan_.outputs) {
            const Buffer& buffer = values.at(port->name);
            std::vector<int64_t> shape(buffer.shape.begin() + 1, buffer.shape.end());
            outputs.push_back({port->name, buffer.dtype, std::move(shape), buffer.row(), buffer.memory.data()});
        }
        bindings_.clear();
        values_ = std::move(values);
        outputs_ = std::move(outputs);
    }

    Owned<OrtValue> value(const Buffer& buffer, int first, int stop) const {
        std::vector<int64_t> shape = buffer.shape;
        uint8_t* data = buffer.memory.data();
        size_t bytes = buffer.memory.bytes();
        if (buffer.of_slots) {
            shape[0] = stop - first;
            data += first * buffer.row();
            bytes = (stop - first) * buffer.row();
        }
        Owned<OrtValue> made(ort_.ReleaseValue);
        const OrtMemoryInfo* info = buffer.on_device ? device_info_.get() : memory_info_.get();
        ort_.check(ort_.CreateTensorWithDataAsOrtValue(info, data, bytes, shape.data(), shape.size(),
                                                       element_of(buffer.dtype), made.into()),
                   "a buffer for ONNX Runtime");
        return made;
    }

    // A tensor on the host, whole.
    Owned<OrtValue> value(const void* data, const std::vector<int64_t>& shape, fs_dtype dtype) const {
        Owned<OrtValue> made(ort_.ReleaseValue);
        ort_.check(ort_.CreateTensorWithDataAsOrtValue(memory_info_.get(), const_cast<void*>(data),
                                                       bytes_of_tensor(shape, dtype), shape.data(), shape.size(),
                                                       element_of(dtype), made.into()),
                   "a buffer for ONNX Runtime");
        return made;
    }

    Run bind_states(size_t index, int slot) const {
        const std::string what = "ONNX Runtime could not bind a state";
        Run run;
        run.binding = Owned<OrtIoBinding>(ort_.ReleaseIoBinding);
        ort_.check(ort_.CreateIoBinding(sessions_[index].get(), run.binding.into()), what);
        for (const StateUse& use : plan_.graphs[index]->states) {
            run.states.push_back(value(states_[state_index(use.state)], slot, slot + 1));
            OrtValue* state = run.states.back().get();
            ort_.check(ort_.BindInput(run.binding.get(), use.input.c_str(), state), what);
            if (!use.output.empty()) ort_.check(ort_.BindOutput(run.binding.get(), use.output.c_str(), state), what);
        }
        return run;
    }

    void run_bound(size_t index, Run& run, const std::vector<HostTensor>& inputs,
                   const std::vector<std::vector<int64_t>>& outputs) const {
        const Graph& graph = *plan_.graphs[index];
        const std::string what = "graph '" + graph.name + "': ONNX Runtime failed";
        std::vector<Owned<OrtValue>> values;
        for (size_t input = 0; input < inputs.size(); ++input) {
            const Port& port = graph.inputs[input];
            values.push_back(value(inputs[input].data, inputs[input].shape, port.dtype));
            ort_.check(ort_.BindInput(run.binding.get(), port.name.c_str(), values.back().get()), what);
        }
        run.outputs.resize(outputs.size());
        for (size_t output = 0; output < outputs.size(); ++output) {
            const Port& port = graph.outputs[output];
            Buffer& buffer = run.outputs[output];
            const bool bound = buffer.memory.data() != nullptr;
            if (bound && buffer.shape == outputs[output]) continue;
            if (!bound || bytes_of_tensor(outputs[output], port.dtype) > buffer.memory.bytes()) {
                buffer = allocate(outputs[output], port.dtype, false, false);
            }
            buffer.shape = outputs[output];
            values.push_back(value(buffer.memory.data(), buffer.shape, port.dtype));
            ort_.check(ort_.BindOutput(run.binding.get(), port.name.c_str(), values.back().get()), what);
        }
        ort_.check(ort_.RunWithBinding(sessions_[index].get(), nullptr, run.binding.get()), what);
    }

    const Buffer& input(const Port& port) const {
        if (port.role == "frame") return frames_;
        if (port.role == "position") return positions_;
        if (port.role == "output") return values_.at(port.name);
        const auto found = labels_.find(port.role);
        if (found == labels_.end()) {
            throw Error(FS_ERROR_ENGINE, "input '" + port.name +
                                               "' needs labels; set them before the first step, or add them to the bundle"
                                               " with 'framestep label'");
        }
        return found->second;
    }

    std::vector<Binding> bind(int first, int stop) const {
        const std::string what = "ONNX Runtime could not bind a buffer";
        std::vector<Binding> bindings;
        for (size_t index = 0; index < plan_.step_graphs; ++index) {
            const Graph& graph = *plan_.graphs[index];
            Binding made;
            made.binding = Owned<OrtIoBinding>(ort_.ReleaseIoBinding);
            ort_.check(ort_.CreateIoBinding(sessions_[index].get(), made.binding.into()), what);
            const auto bind_one = [&](auto call, const std::string& name, const Buffer& buffer) {
                made.values.push_back(value(buffer, first, stop));
                ort_.check(call(made.binding.get(), name.c_str(), made.values.back().get()), what);
            };
            for (const Port& port : graph.inputs) {
                const Buffer& buffer = input(port);
                bind_one(ort_.BindInput, port.name, buffer);
                if (options_.device == "cuda" && !buffer.on_device) {
                    made.copied.push_back({port.name.c_str(), made.values.back().get()});
                }
            }
            for (const Port& port : graph.outputs) bind_one(ort_.BindOutput, port.name, values_.at(port.name));
            for (const StateUse& use : graph.states) {
                const Buffer& buffer = states_[state_index(use.state)];
                bind_one(ort_.BindInput, use.input, buffer);
                if (!use.output.empty()) bind_one(ort_.BindOutput, use.output, buffer);
            }
            bindings.push_back(std::move(made));
        }
        return bindings;
    }

    size_t state_index(const std::string& name) const {
        const auto found = std::find_if(plan_.states.begin(), plan_.states.end(),
                                        [&](const State* state) { return state->name == name; });
        return static_cast<size_t>(found - plan_.states.begin());
    }

    // A session that copies numbers of a type, made once: it takes longer than many a copy.
    void make_copier(fs_dtype dtype) {
        Owned<OrtNativeSession>& session = copiers_.try_emplace(dtype, ort_.ReleaseSession).first->second;
        if (session.get() != nullptr) return;
        const std::string model = identity_model(element_of(dtype));
        const Owned<OrtSessionOptions> options = session_options(ort_, options_, false);
        ort_.check(ort_.CreateSessionFromArray(ort_.env, model.data(), model.size(), options.get(), session.into()),
                   "ONNX Runtime could not copy a state");
    }

    // Between a slot's state on the device and the host.
    void copy(const Buffer& state, uint8_t* device, void* host, bool to_device) const {
        const std::string what = "ONNX Runtime could not copy a state";
        OrtNativeSession* session = copiers_.at(state.dtype).get();
        const int64_t count = static_cast<int64_t>(state.row() / bytes_of(state.dtype));
        Owned<OrtValue> there(ort_.ReleaseValue), here(ort_.ReleaseValue);
        ort_.check(ort_.CreateTensorWithDataAsOrtValue(device_info_.get(), device, state.row(), &count, 1,
                                                       element_of(state.dtype), there.into()), what);
        ort_.check(ort_.CreateTensorWithDataAsOrtValue(memory_info_.get(), host, state.row(), &count, 1,
                                                       element_of(state.dtype), here.into()), what);
        Owned<OrtIoBinding> binding(ort_.ReleaseIoBinding);
        ort_.check(ort_.CreateIoBinding(session, binding.into()), what);
        ort_.check(ort_.BindInput(binding.get(), "x", to_device ? here.get() : there.get()), what);
        ort_.check(ort_.BindOutput(binding.get(), "y", to_device ? there.get() : here.get()), what);
        ort_.check(ort_.RunWithBinding(session, nullptr, binding.get()), what);
    }

    static size_t integer_states(const Graph& graph, const Manifest& manifest) {
        return static_cast<size_t>(std::count_if(graph.states.begin(), graph.states.end(), [&](const StateUse& use) {
            return std::any_of(manifest.states.begin(), manifest.states.end(), [&](const State& state) {
                return state.name == use.state && state.dtype == FS_INT8;
            });
        }));
    }

    const Ort& ort_;
    const EngineOptions options_;
    const Plan plan_;
    Owned<OrtMemoryInfo> memory_info_;
    Owned<OrtMemoryInfo> device_info_;
    std::unique_ptr<OwnOperators> operators_;        // outlives the sessions
    std::vector<Owned<OrtNativeSession>> sessions_;  // as in the plan
    std::vector<size_t> own_operators_;              // as in the plan
    Owned<OrtAllocator> device_allocator_;           // of the first session: freed before it
    std::map<fs_dtype, Owned<OrtNativeSession>> copiers_;  // of states on a device, by type
    int64_t streams_;
    Buffer frames_;
    Buffer positions_;
    std::vector<Buffer> states_;              // as in the plan
    std::map<std::string, Buffer> labels_;    // by role
    std::map<std::string, Buffer> values_;    // outputs of graphs by name
    std::vector<Output> outputs_;             // as in the plan
    std::map<std::pair<int, int>, std::vector<Binding>> bindings_;  // by range of slots
    std::vector<std::vector<Run>> runs_;      // by graph and slot
};

}  // namespace

std::unique_ptr<Engine> make_onnxruntime_engine(const Bundle& bundle, const Manifest& manifest, const Plan& plan,
                                                const EngineOptions& options) {
    return std::make_unique<OnnxRuntimeEngine>(bundle, manifest, plan, options);
}

}  // namespace framestep
