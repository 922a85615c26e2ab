// An engine runs the graphs of a bundle over buffers that it allocates once. It knows no model by name: roles and states
// of the manifest drive it. Not safe for several threads: the session takes turns.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "plan.h"

namespace framestep {

// ONNX Runtime with no operator but its own, and with products of float32 in bfloat16.
constexpr const char* PLAIN = "onnxruntime:plain";
constexpr const char* BFLOAT16 = "onnxruntime:bf16";

struct EngineOptions {
    std::string engine;   // "onnxruntime", PLAIN, BFLOAT16 or "tensorrt"
    std::string device;   // "cpu" or "cuda"
    std::string library;  // the engine's shared library; empty: where it usually is
    int streams = 1;      // slots
    int threads = 1;
};

// What the label graphs take beside features.
struct LabelInputs {
    size_t count = 0;
    size_t text_hidden = 0;
    size_t patch_text_hidden = 0;
    std::vector<float> text_embeddings;        // [count, text_hidden]
    std::vector<float> patch_text_embeddings;  // [count, patch_text_hidden]
    float logit_scale = 0;
    float logit_bias = 0;
};

// An output on the host, with a row for each slot.
struct Output {
    std::string name;
    fs_dtype dtype;
    std::vector<int64_t> shape;  // of one slot
    size_t bytes;                // of one slot
    const uint8_t* data;
};

// A tensor of the caller's.
struct HostTensor {
    const void* data;
    std::vector<int64_t> shape;
};

class Engine {
public:
    virtual ~Engine() = default;

    virtual const char* name() const = 0;  // as EngineOptions has it
    virtual std::string library() const = 0;
    virtual std::string library_version() const = 0;

    // Where the next frame of a slot is to be put: uint8 [height, width, 3].
    virtual uint8_t* frame(int slot) = 0;

    // Frames since reset, [streams]; the engine only reads them.
    virtual int64_t* positions() = 0;

    // Takes the place of the labels so far, of shapes that the graphs take. Allocates: outputs move.
    virtual void set_labels(const LabelInputs& labels) = 0;

    // One step of the slots first..stop; every slot in the range runs, with state in place.
    virtual void run(int first, int stop) = 0;

    // As in the plan. What the last run wrote, in the rows of its slots.
    virtual const std::vector<Output>& outputs() const = 0;

    // A slot's memory of the plan's state `index`, as contiguous numbers of the manifest's type.
    virtual void read_state(size_t index, int slot, void* out) = 0;
    virtual void write_state(size_t index, int slot, const void* data) = 0;
    virtual void zero_state(size_t index, int slot) = 0;
    virtual uintptr_t state_address(size_t index) const = 0;

    // Parts of graph `index` of the plan that operators of ours run in the place of the engine's.
    virtual size_t own_operators(size_t index) const {
        (void)index;
        return 0;
    }

    // Whether the graphs that are not of a step can be run.
    virtual bool runs_graphs() const { return false; }

    // Runs graph `index` of the plan by itself for a slot, with its states in place. Shapes are the graph's own for one
    // stream: `inputs` and `outputs` are as the graph's, and the numbers of outputs are borrowed until this graph's next
    // run for the slot. Called at once from several threads for graphs that write no common state.
    virtual void run_graph(size_t index, int slot, const std::vector<HostTensor>& inputs,
                           const std::vector<std::vector<int64_t>>& outputs) {
        (void)index, (void)slot, (void)inputs, (void)outputs;
        throw Error(FS_ERROR_INTERNAL, "this engine runs steps only");
    }
    virtual const uint8_t* graph_output(size_t index, int slot, size_t output) const {
        (void)index, (void)slot, (void)output;
        return nullptr;
    }
};

std::unique_ptr<Engine> make_onnxruntime_engine(const Bundle& bundle, const Manifest& manifest, const Plan& plan,
                                                const EngineOptions& options);

// Whether ONNX Runtime can run on the device ("cpu" or "cuda") here.
bool onnxruntime_has_device(const std::string& library, const std::string& device);

}  // namespace framestep
