// The memory of a session's streams: read, written, and kept in files.
#include "session.h"
#include "state_file.h"

namespace framestep {
namespace {

void check_state(const Plan& plan, size_t index, size_t bytes) {
    if (index >= plan.states.size()) {
        throw Error(FS_ERROR_ARGUMENT,
                    "state " + std::to_string(index) + ": this session has " + std::to_string(plan.states.size()));
    }
    const State& state = *plan.states[index];
    if (bytes != state.bytes()) {
        throw Error(FS_ERROR_ARGUMENT, "state '" + state.name + "': expected " + std::to_string(state.bytes()) +
                                           " bytes, found " + std::to_string(bytes));
    }
}

// Room for a stream's memory, and views of it for the state file.
struct StateCopy {
    explicit StateCopy(const Plan& plan) {
        for (const State* state : plan.states) {
            memory.emplace_back(state->bytes());
            views.push_back({state->name, name_of(state->dtype), state->shape, memory.back().data(),
                             memory.back().size()});
        }
    }

    std::vector<std::vector<uint8_t>> memory;
    std::vector<TensorView> views;
};

}  // namespace

void Session::read_state(fs_stream stream, size_t index, void* data, size_t bytes) {
    check_state(plan_, index, bytes);
    const Guard taken(*this, stream);
    const auto lanes = lock_lanes();
    const auto guard = lock_open();
    engine_->read_state(index, taken.slot, data);
}

void Session::write_state(fs_stream stream, size_t index, const void* data, size_t bytes) {
    check_state(plan_, index, bytes);
    const Guard taken(*this, stream);
    const auto lanes = lock_lanes();
    const auto guard = lock_open();
    engine_->write_state(index, taken.slot, data);
}

void Session::check_state_key() const {
    if (state_key_.empty()) throw Error(FS_ERROR_STATE, bundle_.path.string() + ": its manifest does not list its files");
}

void Session::save_state(fs_stream stream, const std::string& path) {
    check_state_key();
    StateCopy copy(plan_);
    const Guard taken(*this, stream);
    int64_t position = 0;
    {
        const auto lanes = lock_lanes();
        const auto guard = lock_open();
        for (size_t index = 0; index < copy.memory.size(); ++index) {
            engine_->read_state(index, taken.slot, copy.memory[index].data());
        }
        position = engine_->positions()[taken.slot];
    }
    framestep::write_state(path, state_key_, position, copy.views);  // other streams go on meanwhile
}

void Session::load_state(fs_stream stream, const std::string& path) {
    check_state_key();
    StateCopy copy(plan_);
    const Guard taken(*this, stream);
    const int64_t position = framestep::read_state(path, state_key_, copy.views);
    const auto lanes = lock_lanes();
    const auto guard = lock_open();
    engine_->positions()[taken.slot] = 0;  // should the engine fail, what is half written is out of sight
    for (size_t index = 0; index < copy.memory.size(); ++index) {
        engine_->write_state(index, taken.slot, copy.memory[index].data());
    }
    engine_->positions()[taken.slot] = position;
}

}  // namespace framestep
