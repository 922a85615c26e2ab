// Sessions and streams: a model, and the memory of each camera.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"
#include "manifest.h"
#include "preprocess.h"

namespace framestep {

struct SessionOptions {
    std::string engine = "auto";
    std::string device = "auto";
    std::string precision = "auto";
    std::string library;
    std::vector<std::string> outputs;  // empty: the default
    std::vector<std::string> graphs;   // to be run by themselves
    int streams = 1;
    int threads = 0;  // 0: every usable core
    std::string manifest;  // empty: the bundle's own
    bool trust_files = false;
};

// A frame for a stream, and what became of it; as fs_frame.
struct Frame {
    fs_stream stream;
    Picture picture;
    fs_status status;
    int64_t position;
    uint64_t nonfinite;
};

// A tensor for a graph that runs by itself; as fs_input.
struct NamedTensor {
    std::string name;
    fs_dtype dtype;
    HostTensor tensor;
};

// Safe to call from several threads. A session lives as long as anybody uses it; `close` refuses whatever comes after.
class Session {
public:
    Session(const std::string& path, const SessionOptions& options);

    void close();
    bool closed() const { return closed_.load(std::memory_order_acquire); }

    // Takes a free place for a stream, whose number the handle registry gave.
    void open_stream(fs_stream stream);
    void close_stream(fs_stream stream);

    // Advances the streams of `count` frames, in one run. Throws where nothing advanced; returns FS_ERROR_NONFINITE
    // where a frame's status says so.
    fs_status step(Frame* frames, size_t count);
    void warm_up(int steps);
    void set_labels(LabelInputs labels, std::vector<std::string> names);

    // Runs graph `index` of the plan by itself. Returns FS_ERROR_NONFINITE where an output has NaN or infinity.
    fs_status run(fs_stream stream, size_t index, const std::vector<NamedTensor>& inputs);
    void run_output(fs_stream stream, size_t index, size_t output, fs_tensor& tensor);

    void output(fs_stream stream, size_t index, fs_tensor& tensor);
    bool output_valid(fs_stream stream, uint64_t generation);
    void reset(fs_stream stream);
    int64_t position(fs_stream stream);
    void seek(fs_stream stream, int64_t position);
    void read_state(fs_stream stream, size_t index, void* data, size_t bytes);
    void write_state(fs_stream stream, size_t index, const void* data, size_t bytes);
    void save_state(fs_stream stream, const std::string& path);
    void load_state(fs_stream stream, const std::string& path);
    void drop(fs_stream stream, uint64_t frames);
    void stats(fs_stream stream, fs_stats& stats);

    const Bundle& bundle() const { return bundle_; }
    const Manifest& manifest() const { return *manifest_; }
    const Plan& plan() const { return plan_; }
    const Engine& engine() const { return *engine_; }
    const EngineOptions& engine_options() const { return engine_options_; }
    const std::string& state_key() const { return state_key_; }
    std::string engine_name() const { return engine_->name(); }
    const char* library() const { return library_.c_str(); }
    const char* library_version() const { return library_version_.c_str(); }
    size_t labels();
    const char* label(size_t index);
    void describe_output(size_t index, fs_output_info& info);

private:
    static constexpr size_t LATENCIES = 4096;
    static constexpr fs_stream TAKEN = fs_stream{1} << 63;  // beside a stream's number: a call is at work in it

    // What a graph's last run for a slot gave; under the graph's lane, but for the generation.
    struct RunResult {
        std::vector<std::vector<int64_t>> shapes;
        std::atomic<uint64_t> generation{0};  // 0: none
    };

    struct Slot {
        std::atomic<fs_stream> handle{0};  // 0: nobody's
        std::atomic<uint64_t> result{0};   // generation of the outputs; 0: none
        std::atomic<uint64_t> refused{0};
        bool open = false;                 // under lock_
        uint64_t frames = 0;               // from here on under the stream's guard
        uint64_t dropped = 0;
        uint64_t nonfinite = 0;
        double last_ms = 0, last_preprocess_ms = 0, last_engine_ms = 0;
        std::array<float, LATENCIES> latencies;
        Preprocess preprocess;             // under lock_
        std::vector<RunResult> runs;       // by graph

        Slot(int height, int width, Resize resize, size_t graphs)
            : latencies{}, preprocess(height, width, resize), runs(graphs) {}
    };

    // A stream taken by this thread for one call; refused where another thread has it.
    class Guard {
    public:
        Guard(Session& session, fs_stream stream) : session_(session), stream_(stream), slot(session.take(stream)) {}
        ~Guard() { session_.release(slot, stream_); }
        Guard(const Guard&) = delete;
        Guard& operator=(const Guard&) = delete;

    private:
        Session& session_;
        const fs_stream stream_;

    public:
        const int slot;
    };
    class StepGuard;

    int slot_of(fs_stream stream) const;
    int take(fs_stream stream);
    void release(int slot, fs_stream stream);
    std::unique_lock<std::mutex> lock_open();
    std::vector<std::unique_lock<std::mutex>> lock_lanes();
    std::mutex& lane(size_t graph) { return lanes_[graph_lanes_[graph]]; }
    void make_lanes();
    void forget_outputs(int first, int stop);
    void check_state_key() const;
    uint64_t nonfinite_outputs(int slot) const;

    Bundle bundle_;
    const Manifest* manifest_;
    Plan plan_;
    EngineOptions engine_options_;
    std::string state_key_;
    std::string library_;
    std::string library_version_;
    std::unique_ptr<Engine> engine_;
    std::vector<std::unique_ptr<Slot>> slots_;
    // Graphs that write a common state are in one lane, those of steps together in lane 0; one at a time in each. Taken
    // before lock_, and several in their order.
    std::vector<size_t> graph_lanes_;
    std::vector<std::vector<size_t>> written_;  // states by graph
    std::vector<std::mutex> lanes_;
    std::mutex lock_;           // one step at a time
    std::mutex outputs_lock_;   // what and where outputs are; never held during a run
    std::vector<std::string> label_names_;  // under outputs_lock_
    std::atomic<bool> closed_{false};
    std::atomic<uint64_t> generations_{0};
};

}  // namespace framestep
