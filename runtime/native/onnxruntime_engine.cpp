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
#include "ort_api.h"
#include "own_operators.h"

namespace framestep {
namespace {

constexpr size_t ALIGNMENT = 64;        // bytes: a cache line
constexpr size_t MOST_BINDINGS = 1024;  // ranges of slots that stay bound: all of 44 streams'
// MatMulAddFusion makes a Gemm with a float bias, which is no integer product; CommonSubexpressionElimination merges the
// quantizers of layers that share an input, and a shared one is not fused. Such layers would run in float.
constexpr const char* BREAK_INTEGER_PRODUCTS = "MatMulAddFusion;CommonSubexpressionElimination";

int element_of(fs_dtype dtype) {
    switch (dtype) {
        case FS_UINT8: return ORT_UINT8;
        case FS_INT8: return ORT_INT8;
        case FS_INT32: return ORT_INT32;
        case FS_INT64: return ORT_INT64;
        case FS_BOOL: return ORT_BOOL;
        case FS_FLOAT16: return ORT_FLOAT16;
        case FS_FLOAT32: return ORT_FLOAT;
    }
    return 0;
}

// An object of ONNX Runtime's, released with it.
template <class T>
class Owned {
public:
    Owned() = default;
    explicit Owned(void (*release)(T*)) : release_(release) {}
    Owned(Owned&& other) noexcept : object_(std::exchange(other.object_, nullptr)), release_(other.release_) {}
    Owned& operator=(Owned&& other) noexcept {
        std::swap(object_, other.object_);
        std::swap(release_, other.release_);
        return *this;
    }
    ~Owned() {
        if (object_ != nullptr) release_(object_);
    }

    T* get() const { return object_; }
    T** into() { return &object_; }

private:
    T* object_ = nullptr;
    void (*release_)(T*) = nullptr;
};

Owned<OrtSessionOptions> session_options(const Ort& ort, const EngineOptions& engine, bool integer) {
    Owned<OrtSessionOptions> options(ort.ReleaseSessionOptions);
    const std::string what = "ONNX Runtime's options";
    const auto entry = [&](const char* key, const char* value) {
        ort.check(ort.AddSessionConfigEntry(options.get(), key, value), what);
    };
    ort.check(ort.CreateSessionOptions(options.into()), what);
    ort.check(ort.SetIntraOpNumThreads(options.get(), engine.threads), what);
    ort.check(ort.SetInterOpNumThreads(options.get(), 1), what);  // a step graph is a chain: nothing runs side by side
    ort.check(ort.SetSessionExecutionMode(options.get(), ORT_SEQUENTIAL), what);
    ort.check(ort.SetSessionGraphOptimizationLevel(options.get(), ORT_ENABLE_ALL), what);
    ort.check(ort.SetSessionLogSeverityLevel(options.get(), ORT_WARNING), what);
    // spin between operators, where a wake-up would cost more than it saves, but not between frames
    entry("session.intra_op.allow_spinning", "1");
    entry("session.force_spinning_stop", "1");
    // weights in blocks of integers: multiply integers (4), not floats; only such layers are concerned
    entry("session.qdq_matmulnbits_accuracy_level", "4");
    if (integer) entry("optimization.disable_specified_optimizers", BREAK_INTEGER_PRODUCTS);
    if (engine.device == "cuda") {
        Owned<OrtCudaOptions> cuda(ort.ReleaseCUDAProviderOptions);
        ort.check(ort.CreateCUDAProviderOptions(cuda.into()), "ONNX Runtime could not use CUDA");
        // unless told otherwise it rounds the factors of float32 products to 10 bits
        const char *const keys[] = {"use_tf32"}, *const values[] = {"0"};
        ort.check(ort.UpdateCUDAProviderOptions(cuda.get(), keys, values, 1), "ONNX Runtime could not use CUDA");
        ort.check(ort.SessionOptionsAppendExecutionProvider_CUDA_V2(options.get(), cuda.get()),
                  "ONNX Runtime could not use CUDA");
    }
    return options;
}

// Zeroed memory that starts on a cache line; of the host, or of a device through ONNX Runtime's allocator.
class Memory {
public:
    Memory() = default;
    explicit Memory(size_t bytes) : bytes_(bytes) {
        const size_t rounded = std::max(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
        data_ = rounded < bytes ? nullptr : std::aligned_alloc(ALIGNMENT, rounded);
        if (data_ == nullptr) fail("the host");
        std::memset(data_, 0, rounded);
    }
    Memory(const Ort& ort, OrtAllocator* allocator, size_t bytes) : bytes_(bytes), ort_(&ort), allocator_(allocator) {
        OrtStatus* status = ort.AllocatorAlloc(allocator, std::max(ALIGNMENT, bytes), &data_);
        if (status != nullptr) ort.ReleaseStatus(status);
        if (status != nullptr || data_ == nullptr) fail("the device");
    }
    Memory(Memory&& other) noexcept { *this = std::move(other); }
    Memory& operator=(Memory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        std::swap(ort_, other.ort_);
        std::swap(allocator_, other.allocator_);
        return *this;
    }
    ~Memory() {
        if (data_ == nullptr) return;
        if (allocator_ == nullptr) {
            std::free(data_);
        } else if (OrtStatus* status = ort_->AllocatorFree(allocator_, data_)) {
            ort_->ReleaseStatus(status);
        }
    }

    uint8_t* data() const { return static_cast<uint8_t*>(data_); }
    size_t bytes() const { return bytes_; }

private:
    [[noreturn]] void fail(const char* where) const {
        throw Error(FS_ERROR_MEMORY, std::string("no memory on ") + where + " for a buffer of " + std::to_string(bytes_) +
                                         " bytes; open the session with fewer streams");
    }

    void* data_ = nullptr;
    size_t bytes_ = 0;
    const Ort* ort_ = nullptr;
    OrtAllocator* allocator_ = nullptr;
};

// A tensor in memory. Its first axis is that of the slots where it has a row for each.
struct Buffer {
    Memory memory;
    std::vector<int64_t> shape;
    fs_dtype dtype = FS_FLOAT32;
    bool of_slots = false;
    bool on_device = false;

    size_t row() const {  // bytes of a slot
        size_t total = bytes_of(dtype);
        for (size_t axis = 1; axis < shape.size(); ++axis) total *= static_cast<size_t>(shape[axis]);
        return total;
    }
};

// An ONNX model of one Identity, float16 or another type, one axis of any size: y = x. It moves memory from and to a
// device, for which the C interface has nothing else.
std::string identity_model(int element) {
    const auto field = [](int number, const std::string& content) {
        return std::string(1, static_cast<char>(number << 3 | 2)) + static_cast<char>(content.size()) + content;
    };
    const auto value = [&](int number, const char* name) {
        const std::string shape = field(2, field(1, field(2, "n")));
        const std::string type = field(1, std::string("\x08") + static_cast<char>(element) + shape);
        return field(number, field(1, name) + field(2, type));
    };
    const std::string node = field(1, field(1, "x") + field(2, "y") + field(4, "Identity"));
    const std::string graph = node + field(2, "copy") + value(11, "x") + value(12, "y");
    return std::string("\x08\x08") + field(7, graph) + field(8, field(1, "") + "\x10\x0d");  // IR 8, opset 13
}

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
            check_ports(path, *graph, manifest, sessions_.back().get());
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
            if (!use.input.empty()) ort_.check(ort_.BindInput(run.binding.get(), use.input.c_str(), state), what);
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
                if (!use.input.empty()) bind_one(ort_.BindInput, use.input, buffer);
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

    // Buffers are bound by the manifest alone: compare it with the graph.
    void check_ports(const std::string& path, const Graph& graph, const Manifest& manifest, OrtNativeSession* session) const {
        using Declared = std::map<std::string, std::pair<int, std::vector<Dim>>>;
        Declared inputs, outputs;
        for (const Port& port : graph.inputs) inputs[port.name] = {element_of(port.dtype), port.shape};
        for (const Port& port : graph.outputs) outputs[port.name] = {element_of(port.dtype), port.shape};
        for (const StateUse& use : graph.states) {
            const auto state = std::find_if(manifest.states.begin(), manifest.states.end(),
                                            [&](const State& one) { return one.name == use.state; });
            std::vector<Dim> shape = {{0, 'S'}};
            for (const int64_t size : state->shape) shape.push_back({size, 0});
            if (!use.input.empty()) inputs[use.input] = {element_of(state->dtype), shape};
            if (!use.output.empty()) outputs[use.output] = {element_of(state->dtype), shape};
        }
        size_t count = 0;
        ort_.check(ort_.SessionGetInputCount(session, &count), path);
        check_side(path, "input", inputs, session, count, ort_.SessionGetInputName, ort_.SessionGetInputTypeInfo);
        ort_.check(ort_.SessionGetOutputCount(session, &count), path);
        check_side(path, "output", outputs, session, count, ort_.SessionGetOutputName, ort_.SessionGetOutputTypeInfo);
    }

    template <class Declared, class GetName, class GetType>
    void check_side(const std::string& path, const std::string& kind, const Declared& declared, OrtNativeSession* session,
                    size_t count, GetName get_name, GetType get_type) const {
        const auto refuse = [&](const std::string& name, const std::string& in_graph, const std::string& in_manifest) {
            throw Error(FS_ERROR_BUNDLE, path + ": " + kind + " '" + name + "' is " + in_graph + " in the graph and " +
                                             in_manifest + " in the manifest; export the bundle again");
        };
        OrtAllocator* allocator = nullptr;
        ort_.check(ort_.GetAllocatorWithDefaultOptions(&allocator), path);
        std::map<std::string, bool> seen;
        for (size_t index = 0; index < count; ++index) {
            char* text = nullptr;
            ort_.check(get_name(session, index, allocator, &text), path);
            const std::string name = text;
            ort_.check(ort_.AllocatorFree(allocator, text), path);
            const auto found = declared.find(name);
            Owned<OrtTypeInfo> type(ort_.ReleaseTypeInfo);
            ort_.check(get_type(session, index, type.into()), path);
            const auto actual = describe(type.get(), path);
            if (found == declared.end()) refuse(name, text_of(actual), "absent");
            if (actual != found->second) refuse(name, text_of(actual), text_of(found->second));
            seen[name] = true;
        }
        for (const auto& item : declared) {
            if (seen.count(item.first) == 0) refuse(item.first, "absent", text_of(item.second));
        }
    }

    // "float32 [S, 96]"
    static std::string text_of(const std::pair<int, std::vector<Dim>>& port) {
        std::string sizes, kind = "of type " + std::to_string(port.first);
        for (const fs_dtype dtype : {FS_UINT8, FS_INT8, FS_INT32, FS_INT64, FS_BOOL, FS_FLOAT16, FS_FLOAT32}) {
            if (element_of(dtype) == port.first) kind = name_of(dtype);
        }
        for (const Dim& dim : port.second) {
            sizes += (sizes.empty() ? "" : ", ") + (dim.symbol != 0 ? std::string(1, dim.symbol) : std::to_string(dim.size));
        }
        return kind + " [" + sizes + "]";
    }

    std::pair<int, std::vector<Dim>> describe(const OrtTypeInfo* type, const std::string& path) const {
        const OrtTensorInfo* tensor = nullptr;
        ort_.check(ort_.CastTypeInfoToTensorInfo(type, &tensor), path);
        if (tensor == nullptr) return {0, {}};
        int element = 0;
        size_t rank = 0;
        ort_.check(ort_.GetTensorElementType(tensor, &element), path);
        ort_.check(ort_.GetDimensionsCount(tensor, &rank), path);
        std::vector<int64_t> sizes(rank);
        std::vector<const char*> symbols(rank);
        ort_.check(ort_.GetDimensions(tensor, sizes.data(), rank), path);
        ort_.check(ort_.GetSymbolicDimensions(tensor, symbols.data(), rank), path);
        std::vector<Dim> shape;
        for (size_t axis = 0; axis < rank; ++axis) {
            const bool named = sizes[axis] < 0 && symbols[axis] != nullptr && std::strlen(symbols[axis]) == 1;
            shape.push_back(sizes[axis] >= 0 ? Dim{sizes[axis], 0} : Dim{0, named ? symbols[axis][0] : '?'});
        }
        return {element, shape};
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

bool onnxruntime_has_device(const std::string& library, const std::string& device) {
    const Ort& ort = load_ort(library);
    if (device == "cpu") return true;
    char** names = nullptr;
    int count = 0;
    ort.check(ort.GetAvailableProviders(&names, &count), "ONNX Runtime's providers");
    bool built_in = false;  // it says what it was built with, whether there is a GPU or not
    for (int index = 0; index < count; ++index) built_in |= std::strcmp(names[index], "CUDAExecutionProvider") == 0;
    ort.check(ort.ReleaseAvailableProviders(names, count), "ONNX Runtime's providers");
    if (!built_in) return false;
    try {
        EngineOptions engine;
        engine.device = device;
        const Owned<OrtSessionOptions> options = session_options(ort, engine, false);
        Owned<OrtNativeSession> session(ort.ReleaseSession);
        const std::string model = identity_model(ORT_FLOAT);
        ort.check(ort.CreateSessionFromArray(ort.env, model.data(), model.size(), options.get(), session.into()), "CUDA");
        return true;
    } catch (const Error&) {
        return false;  // no GPU, no driver, or one that does not fit
    }
}

}  // namespace framestep
