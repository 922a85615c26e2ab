#include "fake_engine.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <mutex>

#include "engine.h"

namespace framestep {
namespace fake {
namespace {

std::atomic<long> until_failure{0}, failed{0};
std::mutex gate;
std::condition_variable changed;
bool held = false;
int waiting = 0;

void enter(const char* what) {
    if (until_failure.load() > 0 && until_failure.fetch_sub(1) == 1) {
        failed.fetch_add(1);
        throw Error(FS_ERROR_ENGINE, std::string("failed as told in ") + what);
    }
}

void pass_gate() {
    std::unique_lock guard(gate);
    ++waiting;
    changed.notify_all();
    changed.wait(guard, [] { return !held; });
    --waiting;
}

}  // namespace

void fail_call(long n) { until_failure.store(n); }
long failures() { return failed.load(); }

void hold_runs() {
    const std::lock_guard guard(gate);
    held = true;
}

void wait_for_a_held_run() {
    std::unique_lock guard(gate);
    changed.wait(guard, [] { return held && waiting > 0; });
}

void let_go() {
    const std::lock_guard guard(gate);
    held = false;
    changed.notify_all();
}

}  // namespace fake

namespace {

class FakeEngine : public Engine {
public:
    FakeEngine(const Bundle& bundle, const Plan& plan, const EngineOptions& options)
        : plan_(plan), streams_(options.streams), frame_bytes_(size_t{3} * bundle.height * bundle.width),
          frames_(streams_ * frame_bytes_), positions_(streams_) {
        fake::enter("the constructor");
        for (const State* state : plan.states) states_.emplace_back(streams_ * state->bytes());
        for (const Graph* graph : plan.graphs) runs_.emplace_back(streams_ * graph->outputs.size());
        allocate_outputs(0);
    }

    const char* name() const override { return "fake"; }
    std::string library() const override { return "fake"; }
    std::string library_version() const override { return "0"; }
    uint8_t* frame(int slot) override { return frames_.data() + slot * frame_bytes_; }
    int64_t* positions() override { return positions_.data(); }
    const std::vector<Output>& outputs() const override { return outputs_; }
    uintptr_t state_address(size_t index) const override { return reinterpret_cast<uintptr_t>(states_[index].data()); }

    void set_labels(const LabelInputs& labels) override {
        fake::enter("set_labels");
        allocate_outputs(static_cast<int64_t>(labels.count));
    }

    void run(int first, int stop) override {
        fake::enter("run");
        fake::pass_gate();
        for (int slot = first; slot < stop; ++slot) {
            const float sum = remember(slot, frame(slot)[0]);
            for (size_t index = 0; index < outputs_.size(); ++index) {
                uint8_t* row = memory_[index].data() + slot * outputs_[index].bytes;
                for (size_t at = 0; at < outputs_[index].bytes; at += sizeof sum) std::memcpy(row + at, &sum, sizeof sum);
            }
        }
    }

    void read_state(size_t index, int slot, void* out) override {
        fake::enter("read_state");
        std::memcpy(out, place(index, slot), plan_.states[index]->bytes());
    }

    void write_state(size_t index, int slot, const void* data) override {
        fake::enter("write_state");
        std::memcpy(place(index, slot), data, plan_.states[index]->bytes());
    }

    void zero_state(size_t index, int slot) override {
        fake::enter("zero_state");
        std::memset(place(index, slot), 0, plan_.states[index]->bytes());
    }

    bool runs_graphs() const override { return true; }

    // Touches what a real one would, and gives ones.
    void run_graph(size_t index, int slot, const std::vector<HostTensor>&,
                   const std::vector<std::vector<int64_t>>& outputs) override {
        fake::enter("run_graph");
        const Graph& graph = *plan_.graphs[index];
        for (size_t state = 0; state < plan_.states.size(); ++state) {
            const bool written = std::any_of(graph.states.begin(), graph.states.end(), [&](const StateUse& use) {
                return use.state == plan_.states[state]->name && !use.output.empty();
            });
            if (written) std::memset(place(state, slot), 0, plan_.states[state]->bytes());
        }
        for (size_t output = 0; output < outputs.size(); ++output) {
            size_t count = 1;
            for (const int64_t size : outputs[output]) count *= static_cast<size_t>(size);
            runs_[index][slot * outputs.size() + output].assign(count, 1.0f);
        }
    }

    const uint8_t* graph_output(size_t index, int slot, size_t output) const override {
        const size_t outputs = plan_.graphs[index]->outputs.size();
        return reinterpret_cast<const uint8_t*>(runs_[index][slot * outputs + output].data());
    }

private:
    uint8_t* place(size_t index, int slot) { return states_[index].data() + slot * plan_.states[index]->bytes(); }

    // Writes the slot that the frame has in the ring; the sum of the slots that it sees.
    float remember(int slot, uint8_t pixel) {
        const float value = pixel == 255 ? std::numeric_limits<float>::quiet_NaN() : pixel;
        if (states_.empty()) return value;
        const int64_t position = positions_[slot];
        std::memcpy(place(0, slot) + position % fake::WINDOW * sizeof value, &value, sizeof value);
        float sum = 0;
        for (int64_t at = 0; at < std::min<int64_t>(position + 1, fake::WINDOW); ++at) {
            float one;
            std::memcpy(&one, place(0, slot) + at * sizeof one, sizeof one);
            sum += one;
        }
        return sum;
    }

    void allocate_outputs(int64_t labels) {
        std::vector<Output> outputs;
        std::vector<std::vector<uint8_t>> memory;
        for (const Port* port : plan_.outputs) {
            std::vector<int64_t> shape;
            size_t bytes = bytes_of(port->dtype);
            for (size_t axis = 1; axis < port->shape.size(); ++axis) {
                shape.push_back(port->shape[axis].symbol == 'C' ? labels : port->shape[axis].size);
                bytes *= static_cast<size_t>(shape.back());
            }
            memory.emplace_back(streams_ * bytes);
            outputs.push_back({port->name, port->dtype, shape, bytes, memory.back().data()});
        }
        outputs_ = std::move(outputs);
        memory_ = std::move(memory);
    }

    const Plan plan_;
    const size_t streams_;
    const size_t frame_bytes_;
    std::vector<uint8_t> frames_;
    std::vector<int64_t> positions_;
    std::vector<std::vector<uint8_t>> states_;  // as in the plan: [streams, bytes]
    std::vector<Output> outputs_;
    std::vector<std::vector<uint8_t>> memory_;
    std::vector<std::vector<std::vector<float>>> runs_;  // by graph: [streams * outputs]
};

}  // namespace

// In the place of onnxruntime_engine.cpp.
std::unique_ptr<Engine> make_onnxruntime_engine(const Bundle& bundle, const Manifest&, const Plan& plan,
                                                const EngineOptions& options) {
    return std::make_unique<FakeEngine>(bundle, plan, options);
}

bool onnxruntime_has_device(const std::string&, const std::string& device) { return device == "cpu"; }

}  // namespace framestep
