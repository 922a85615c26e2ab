#include "session.h"

#include <algorithm>
#include <cmath>

#include "cores.h"
#include "engine_choice.h"
#include "finite.h"
#include "labels.h"

namespace framestep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int MAX_STREAMS = 4096;
constexpr int64_t MAX_POSITION = int64_t{1} << 62;

double milliseconds(Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double, std::milli>(to - from).count();
}

}  // namespace

Session::Session(const std::string& path, const SessionOptions& options)
    : bundle_(Bundle::open(path, options.manifest, options.trust_files)) {
    if (options.streams < 1 || options.streams > MAX_STREAMS) {
        throw Error(FS_ERROR_ARGUMENT, "streams: expected 1 to " + std::to_string(MAX_STREAMS) + ", found " +
                                           std::to_string(options.streams));
    }
    const std::vector<int> processors = usable_processors();
    const int most = static_cast<int>(processors.size());
    if (options.threads < 0 || options.threads > most) {
        // threads that share a processor wait for each other while they spin: a step then takes tens of times longer
        throw Error(FS_ERROR_ARGUMENT, "threads: expected 1 to " + std::to_string(most) +
                                           ", the cores that this process may use, found " + std::to_string(options.threads));
    }
    const EngineChoice choice =
        choose_engine(bundle_, options.engine, options.device, options.precision, options.library);
    manifest_ = choice.manifest;
    engine_options_.engine = choice.engine;
    engine_options_.device = choice.device;
    engine_options_.library = options.library;
    engine_options_.streams = options.streams;
    engine_options_.threads = options.threads == 0 ? default_threads(processors) : options.threads;
    plan_ = make_plan(bundle_, *manifest_, options.outputs, options.graphs);
    make_lanes();
    state_key_ = bundle_.state_key(*manifest_);
    engine_ = make_engine(bundle_, *manifest_, plan_, engine_options_);
    if (!engine_->runs_graphs() && plan_.step_graphs != plan_.graphs.size()) {
        throw Error(FS_ERROR_ENGINE, std::string("engine '") + engine_->name() + "' runs frames only, no graphs by themselves");
    }
    library_ = engine_->library();
    library_version_ = engine_->library_version();
    for (int slot = 0; slot < options.streams; ++slot) {
        slots_.push_back(std::make_unique<Slot>(bundle_.height, bundle_.width, bundle_.resize, plan_.graphs.size()));
    }
    if (bundle_.labels && bundle_.scoring) {
        LabelInputs labels =
            read_labels(bundle_.path / bundle_.labels->file, bundle_.labels->names.size(), *bundle_.scoring);
        check_labels(plan_, labels);
        engine_->set_labels(labels);
        label_names_ = bundle_.labels->names;
    }
}

// The same for all streams of a step; allocates nothing.
class Session::StepGuard {
public:
    StepGuard(Session& session, const Frame* frames, size_t count) : session_(session), frames_(frames) {
        try {
            for (; taken_ < count; ++taken_) {
                const fs_stream stream = frames[taken_].stream;
                const bool twice = std::any_of(frames, frames + taken_,
                                               [&](const Frame& frame) { return frame.stream == stream; });
                if (twice) throw Error(FS_ERROR_ARGUMENT, "frames: a stream stands twice");
                session.take(stream);
            }
        } catch (...) {
            release();
            throw;
        }
    }
    ~StepGuard() { release(); }
    StepGuard(const StepGuard&) = delete;
    StepGuard& operator=(const StepGuard&) = delete;

private:
    void release() {
        while (taken_ > 0) {
            const fs_stream stream = frames_[--taken_].stream;
            session_.release(session_.slot_of(stream), stream);
        }
    }

    Session& session_;
    const Frame* frames_;
    size_t taken_ = 0;
};

int Session::slot_of(fs_stream stream) const {
    for (size_t slot = 0; stream != 0 && slot < slots_.size(); ++slot) {  // 0 marks a free place
        if ((slots_[slot]->handle.load(std::memory_order_acquire) & ~TAKEN) == stream) return static_cast<int>(slot);
    }
    throw Error(FS_ERROR_HANDLE, "this stream is closed, or belongs to another session");
}

int Session::take(fs_stream stream) {
    const int slot = slot_of(stream);
    fs_stream found = stream;
    if (slots_[slot]->handle.compare_exchange_strong(found, stream | TAKEN, std::memory_order_acquire)) return slot;
    if (found != (stream | TAKEN)) throw Error(FS_ERROR_HANDLE, "this stream is closed");  // a moment ago
    slots_[slot]->refused.fetch_add(1, std::memory_order_relaxed);
    throw Error(FS_ERROR_BUSY, "stream in place " + std::to_string(slot) + ": another thread's call is at work in it");
}

void Session::release(int slot, fs_stream stream) {
    fs_stream found = stream | TAKEN;  // another number where the stream was closed: the place may be someone else's by now
    slots_[slot]->handle.compare_exchange_strong(found, stream, std::memory_order_release);
}

std::unique_lock<std::mutex> Session::lock_open() {
    std::unique_lock<std::mutex> guard(lock_);
    if (closed_.load(std::memory_order_acquire)) throw Error(FS_ERROR_HANDLE, "this session is closed");
    return guard;
}

// Merges graphs until no two lanes write the same state.
void Session::make_lanes() {
    const size_t graphs = plan_.graphs.size();
    written_.resize(graphs);
    std::vector<size_t> lanes(graphs);
    for (size_t graph = 0; graph < graphs; ++graph) {
        lanes[graph] = graph < plan_.step_graphs ? 0 : graph + 1;
        for (const StateUse& use : plan_.graphs[graph]->states) {
            if (use.output.empty()) continue;
            const auto found = std::find_if(plan_.states.begin(), plan_.states.end(),
                                            [&](const State* state) { return state->name == use.state; });
            written_[graph].push_back(static_cast<size_t>(found - plan_.states.begin()));
        }
    }
    for (size_t graph = 0; graph < graphs; ++graph) {
        for (size_t other = 0; other < graph; ++other) {
            const bool shared = std::any_of(written_[graph].begin(), written_[graph].end(), [&](size_t state) {
                return std::find(written_[other].begin(), written_[other].end(), state) != written_[other].end();
            });
            if (!shared) continue;
            const size_t kept = std::min(lanes[graph], lanes[other]), gone = std::max(lanes[graph], lanes[other]);
            std::replace(lanes.begin(), lanes.end(), gone, kept);
        }
    }
    graph_lanes_ = std::move(lanes);
    lanes_ = std::vector<std::mutex>(graphs + 1);
}

std::vector<std::unique_lock<std::mutex>> Session::lock_lanes() {
    std::vector<std::unique_lock<std::mutex>> guards;
    for (std::mutex& lane : lanes_) guards.emplace_back(lane);
    return guards;
}

void Session::close() {
    const auto lanes = lock_lanes();  // waits for runs and a step at work
    const std::lock_guard guard(lock_);
    closed_.store(true, std::memory_order_release);
    forget_outputs(0, static_cast<int>(slots_.size()));
}

void Session::open_stream(fs_stream stream) {
    const auto guard = lock_open();
    for (size_t slot = 0; slot < slots_.size(); ++slot) {
        Slot& place = *slots_[slot];
        if (place.open) continue;
        place.open = true;
        engine_->positions()[slot] = 0;
        place.refused.store(0, std::memory_order_relaxed);
        place.frames = place.dropped = place.nonfinite = 0;
        place.last_ms = place.last_preprocess_ms = place.last_engine_ms = 0;
        place.handle.store(stream, std::memory_order_release);
        return;
    }
    throw Error(FS_ERROR_ENGINE, "every stream of this session is open (" + std::to_string(slots_.size()) + "); open it with more streams");
}

void Session::close_stream(fs_stream stream) {
    const Guard taken(*this, stream);
    const auto lanes = lock_lanes();
    const auto guard = lock_open();
    forget_outputs(taken.slot, taken.slot + 1);
    for (RunResult& run : slots_[taken.slot]->runs) run.generation.store(0, std::memory_order_release);
    slots_[taken.slot]->handle.store(0, std::memory_order_release);
    slots_[taken.slot]->open = false;
}

void Session::forget_outputs(int first, int stop) {
    const std::lock_guard guard(outputs_lock_);
    for (int slot = first; slot < stop; ++slot) slots_[slot]->result.store(0, std::memory_order_release);
}

fs_status Session::step(Frame* frames, size_t count) {
    const Clock::time_point start = Clock::now();
    const StepGuard taken(*this, frames, count);
    const std::lock_guard in_lane(lanes_[0]);
    const auto guard = lock_open();
    if (count == 0) return FS_OK;
    int first = static_cast<int>(slots_.size()), stop = 0;
    const Clock::time_point begin = Clock::now();
    for (size_t index = 0; index < count; ++index) {
        const int slot = slot_of(frames[index].stream);
        slots_[slot]->preprocess.fit(frames[index].picture, engine_->frame(slot));
        first = std::min(first, slot);
        stop = std::max(stop, slot + 1);
    }
    const Clock::time_point fitted = Clock::now();
    forget_outputs(first, stop);
    engine_->run(first, stop);
    const Clock::time_point ran = Clock::now();
    fs_status status = FS_OK;
    for (size_t index = 0; index < count; ++index) {  // before any clock moves: the engine may fail in here
        Frame& frame = frames[index];
        const int slot = slot_of(frame.stream);
        frame.position = engine_->positions()[slot];
        frame.nonfinite = nonfinite_outputs(slot);
        frame.status = frame.nonfinite == 0 ? FS_OK : FS_ERROR_NONFINITE;
        if (frame.nonfinite == 0) continue;
        status = FS_ERROR_NONFINITE;
        for (size_t graph = 0; graph < plan_.step_graphs; ++graph) {
            // a NaN in a hidden slot still counts: 0 * NaN is NaN
            for (const size_t state : written_[graph]) engine_->zero_state(state, slot);
        }
        engine_->positions()[slot] = 0;
        ++slots_[slot]->nonfinite;
    }
    const uint64_t generation = generations_.fetch_add(1, std::memory_order_relaxed) + 1;
    for (size_t index = 0; index < count; ++index) {
        const int slot = slot_of(frames[index].stream);
        if (frames[index].nonfinite == 0) engine_->positions()[slot] += 1;
        slots_[slot]->result.store(generation, std::memory_order_release);
    }
    const Clock::time_point end = Clock::now();
    for (size_t index = 0; index < count; ++index) {
        Slot& place = *slots_[slot_of(frames[index].stream)];
        place.last_ms = milliseconds(start, end);
        place.last_preprocess_ms = milliseconds(begin, fitted);
        place.last_engine_ms = milliseconds(fitted, ran);
        place.latencies[place.frames % LATENCIES] = static_cast<float>(place.last_ms);
        ++place.frames;
    }
    return status;
}

uint64_t Session::nonfinite_outputs(int slot) const {
    uint64_t bad = 0;
    const std::vector<Output>& outputs = engine_->outputs();
    for (size_t index = 0; index < outputs.size(); ++index) {
        const Output& output = outputs[index];
        const uint64_t bit = uint64_t{1} << std::min<size_t>(index, 63);
        if (!all_finite(output.data + slot * output.bytes, output.bytes, output.dtype)) bad |= bit;
    }
    return bad;
}

void Session::warm_up(int steps) {
    const std::lock_guard in_lane(lanes_[0]);
    const auto guard = lock_open();
    if (plan_.step_graphs == 0) return;
    const int streams = static_cast<int>(slots_.size());
    forget_outputs(0, streams);
    for (int step = 0; step < steps; ++step) {
        for (int count = 1; count <= streams; ++count) engine_->run(0, count);
    }
}

void Session::set_labels(LabelInputs labels, std::vector<std::string> names) {
    const auto guard = lock_open();
    const std::lock_guard outputs(outputs_lock_);
    check_labels(plan_, labels);
    engine_->set_labels(labels);
    for (const auto& slot : slots_) slot->result.store(0, std::memory_order_release);
    label_names_ = std::move(names);
}

void Session::output(fs_stream stream, size_t index, fs_tensor& tensor) {
    const int slot = slot_of(stream);
    const std::lock_guard guard(outputs_lock_);
    const std::vector<Output>& outputs = engine_->outputs();
    if (index >= outputs.size()) {
        throw Error(FS_ERROR_ARGUMENT, "output " + std::to_string(index) + ": this session has " +
                                           std::to_string(outputs.size()));
    }
    const uint64_t generation = slots_[slot]->result.load(std::memory_order_acquire);
    if (generation == 0) {
        throw Error(FS_ERROR_STALE, "stream in place " + std::to_string(slot) +
                                        ": has no outputs; it was not stepped yet, or a later step took their place");
    }
    const Output& output = outputs[index];
    tensor.data = output.data + slot * output.bytes;
    tensor.dtype = output.dtype;
    tensor.rank = static_cast<int32_t>(output.shape.size());
    std::copy(output.shape.begin(), output.shape.end(), tensor.shape);
    tensor.bytes = output.bytes;
    tensor.generation = generation;
}

bool Session::output_valid(fs_stream stream, uint64_t generation) {
    if (generation == 0) return false;
    const Slot& slot = *slots_[slot_of(stream)];
    return slot.result.load(std::memory_order_acquire) == generation ||
           std::any_of(slot.runs.begin(), slot.runs.end(), [&](const RunResult& run) {
               return run.generation.load(std::memory_order_acquire) == generation;
           });
}

void Session::reset(fs_stream stream) {
    const Guard taken(*this, stream);
    const auto guard = lock_open();
    engine_->positions()[taken.slot] = 0;
}

int64_t Session::position(fs_stream stream) {
    const Guard taken(*this, stream);
    return engine_->positions()[taken.slot];
}

void Session::seek(fs_stream stream, int64_t position) {
    if (position < 0 || position > MAX_POSITION) {
        throw Error(FS_ERROR_ARGUMENT, "position: expected 0 to 2^62, found " + std::to_string(position));
    }
    const Guard taken(*this, stream);
    const auto guard = lock_open();
    engine_->positions()[taken.slot] = position;
}

void Session::drop(fs_stream stream, uint64_t frames) {
    const Guard taken(*this, stream);
    slots_[taken.slot]->dropped += frames;
}

void Session::stats(fs_stream stream, fs_stats& stats) {
    const Guard taken(*this, stream);
    const Slot& slot = *slots_[taken.slot];
    stats.frames = slot.frames;
    stats.dropped = slot.dropped;
    stats.refused = slot.refused.load(std::memory_order_relaxed);
    stats.nonfinite = slot.nonfinite;
    stats.last_ms = slot.last_ms;
    stats.last_preprocess_ms = slot.last_preprocess_ms;
    stats.last_engine_ms = slot.last_engine_ms;
    if (slot.frames == 0) return;
    std::vector<float> sorted(std::min<uint64_t>(slot.frames, LATENCIES));
    std::copy_n(slot.latencies.begin(), sorted.size(), sorted.begin());
    std::sort(sorted.begin(), sorted.end());
    const auto percentile = [&](double share) {
        const size_t rank = static_cast<size_t>(std::ceil(share * static_cast<double>(sorted.size())));
        return static_cast<double>(sorted[std::max<size_t>(rank, 1) - 1]);
    };
    stats.p50_ms = percentile(0.50);
    stats.p95_ms = percentile(0.95);
    stats.p99_ms = percentile(0.99);
    stats.max_ms = sorted.back();
}

size_t Session::labels() {
    const std::lock_guard guard(outputs_lock_);
    return label_names_.size();
}

const char* Session::label(size_t index) {
    const std::lock_guard guard(outputs_lock_);
    if (index >= label_names_.size()) {
        throw Error(FS_ERROR_ARGUMENT,
                    "label " + std::to_string(index) + ": this session has " + std::to_string(label_names_.size()));
    }
    return label_names_[index].c_str();
}

void Session::describe_output(size_t index, fs_output_info& info) {
    const std::lock_guard guard(outputs_lock_);
    const std::vector<Output>& outputs = engine_->outputs();
    if (index >= outputs.size()) {
        throw Error(FS_ERROR_ARGUMENT, "output " + std::to_string(index) + ": this session has " +
                                           std::to_string(outputs.size()));
    }
    const Output& output = outputs[index];
    info.name = plan_.outputs[index]->name.c_str();
    info.dtype = output.dtype;
    info.rank = static_cast<int32_t>(output.shape.size());
    std::copy(output.shape.begin(), output.shape.end(), info.shape);
    info.bytes = output.bytes;
}

}  // namespace framestep
