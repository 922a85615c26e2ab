// The C functions: handles to sessions, structs to values, exceptions to statuses.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "arguments.h"
#include "framestep.h"
#include "handles.h"
#include "log.h"
#include "session.h"
#include "structs.h"

namespace framestep {
namespace {

thread_local char last_error[5120] = "";  // with the longest path

fs_status fail(fs_status status, const char* message) noexcept {
    std::snprintf(last_error, sizeof last_error, "%s", message);
    return status;
}

// Runs a function of the interface; nothing is thrown beyond.
template <class Function>
fs_status call(Function function) noexcept {
    try {
        return function();
    } catch (const Error& error) {
        return fail(error.code, error.message.c_str());
    } catch (const std::bad_alloc&) {
        return fail(FS_ERROR_MEMORY, "no memory");
    } catch (const std::exception& error) {
        return fail(FS_ERROR_INTERNAL, error.what());
    } catch (...) {
        return fail(FS_ERROR_INTERNAL, "unknown");
    }
}

void check_index(size_t index, size_t count, const char* what) {
    if (index >= count) {
        throw Error(FS_ERROR_ARGUMENT,
                    std::string(what) + " " + std::to_string(index) + ": this session has " + std::to_string(count));
    }
}

fs_status step(fs_session handle, fs_frame* frames, size_t count) {
    const std::shared_ptr<Session> session = session_of(handle);
    if (count == 0) return FS_OK;
    need(frames, "frames");
    if (count > static_cast<size_t>(session->engine_options().streams)) {
        throw Error(FS_ERROR_ARGUMENT, "frames: " + std::to_string(count) + " for a session of " +
                                           counted(static_cast<size_t>(session->engine_options().streams), "stream"));
    }
    const size_t size = frames->struct_size;
    check_size(size, sizeof(fs_frame), "frames");
    static thread_local std::vector<Frame> known;  // grows once
    known.clear();
    auto* place = reinterpret_cast<unsigned char*>(frames);
    for (size_t index = 0; index < count; ++index) {
        const auto given = read_struct<fs_frame>(place + index * size, "frames");
        if (given.struct_size != size) throw Error(FS_ERROR_ARGUMENT, "frames: structs of different sizes");
        known.push_back(frame_of(given, index));
    }
    const fs_status status = session->step(known.data(), count);
    bool first = true;
    for (size_t index = 0; index < count; ++index) {
        auto* out = reinterpret_cast<fs_frame*>(place + index * size);
        out->status = known[index].status;
        out->position = known[index].position;
        out->nonfinite = known[index].nonfinite;
        if (known[index].status != FS_OK && first) {
            first = false;
            fail(status, "the model gave NaN or infinity; the memory of the streams concerned was zeroed and they start"
                         " again at position 0");
        }
    }
    return status;
}

fs_status run(fs_stream handle, size_t graph, const fs_input* inputs, size_t count) {
    const std::shared_ptr<Session> session = stream_of(handle);
    const std::vector<NamedTensor> named = inputs_of(inputs, count);
    const fs_status status = session->run(handle, graph, named);
    if (status == FS_ERROR_NONFINITE) {
        return fail(status, "the model gave NaN or infinity; the states that the graph writes were zeroed for this stream");
    }
    return status;
}

void set_labels(fs_session handle, const fs_labels* given) {
    const std::shared_ptr<Session> session = session_of(handle);
    std::vector<std::string> names;
    LabelInputs labels = labels_of(given, session->bundle(), names);
    session->set_labels(std::move(labels), std::move(names));
}

void describe(Session& session, fs_session_info* out) {
    check_out(out, "info");
    const EngineOptions& options = session.engine_options();
    fs_session_info info{};
    info.engine = session.engine().name();
    info.device = options.device.c_str();
    info.precision = session.manifest().precision.c_str();
    info.library = session.library();
    info.library_version = session.library_version();
    info.state_key = session.state_key().c_str();
    info.rate = session.bundle().rate;
    info.height = session.bundle().height;
    info.width = session.bundle().width;
    info.streams = options.streams;
    info.threads = options.threads;
    info.graphs = session.plan().graphs.size();
    info.states = session.plan().states.size();
    info.outputs = session.plan().outputs.size();
    info.labels = session.labels();
    info.step_graphs = session.plan().step_graphs;
    for (const State* state : session.plan().states) info.state_bytes += state->bytes();
    write_struct(out, info);
}

void describe_port(Session& session, size_t graph, bool input, size_t index, fs_port_info* out) {
    check_out(out, "info");
    check_index(graph, session.plan().graphs.size(), "graph");
    const Graph& described = *session.plan().graphs[graph];
    const std::vector<Port>& ports = input ? described.inputs : described.outputs;
    if (index >= ports.size()) {
        throw Error(FS_ERROR_ARGUMENT, "graph '" + described.name + "' has no " + (input ? "input " : "output ") +
                                           std::to_string(index));
    }
    const Port& port = ports[index];
    fs_port_info info{};
    info.name = port.name.c_str();
    info.role = port.role.c_str();
    info.dtype = port.dtype;
    for (const Dim& dim : port.shape) {
        if (dim.symbol != 'S') info.shape[info.rank++] = dim.symbol == 0 ? dim.size : -1;
    }
    write_struct(out, info);
}

void describe_state(Session& session, size_t index, fs_state_info* out) {
    check_out(out, "info");
    check_index(index, session.plan().states.size(), "state");
    const State& state = *session.plan().states[index];
    fs_state_info info{};
    info.name = state.name.c_str();
    info.dtype = state.dtype;
    info.rank = static_cast<int32_t>(state.shape.size());
    std::copy(state.shape.begin(), state.shape.end(), info.shape);
    info.axis = state.axis;
    info.capacity = state.capacity;
    info.rows_per_slot = state.rows_per_slot;
    info.bytes = state.bytes();
    info.address = session.engine().state_address(index);
    write_struct(out, info);
}

}  // namespace
}  // namespace framestep

using namespace framestep;

extern "C" {

const char* fs_version(void) { return FRAMESTEP_VERSION; }
int32_t fs_api_version(void) { return FS_API_VERSION; }
const char* fs_last_error(void) { return last_error; }

const char* fs_status_name(fs_status status) {
    switch (number_of(status)) {
        case FS_OK: return "FS_OK";
        case FS_ERROR_ARGUMENT: return "FS_ERROR_ARGUMENT";
        case FS_ERROR_HANDLE: return "FS_ERROR_HANDLE";
        case FS_ERROR_BUSY: return "FS_ERROR_BUSY";
        case FS_ERROR_BUNDLE: return "FS_ERROR_BUNDLE";
        case FS_ERROR_ENGINE: return "FS_ERROR_ENGINE";
        case FS_ERROR_FRAME: return "FS_ERROR_FRAME";
        case FS_ERROR_STATE: return "FS_ERROR_STATE";
        case FS_ERROR_OUTPUT: return "FS_ERROR_OUTPUT";
        case FS_ERROR_STALE: return "FS_ERROR_STALE";
        case FS_ERROR_NONFINITE: return "FS_ERROR_NONFINITE";
        case FS_ERROR_MEMORY: return "FS_ERROR_MEMORY";
        case FS_ERROR_INTERNAL: return "FS_ERROR_INTERNAL";
    }
    return "unknown";
}

void fs_log_to(fs_log_callback callback, void* user) { log_to(callback, user); }

fs_status fs_device_available(const char* library, const char* device, int32_t* available) {
    return call([&] {
        need(device, "device");
        need(available, "available");
        const std::string name = device;
        *available = 0;
        if (name != "cpu" && name != "cuda") {
            throw Error(FS_ERROR_ARGUMENT, "device '" + name + "' is unknown; expected cpu or cuda");
        }
        *available = onnxruntime_has_device(text_or(library, ""), name) ? 1 : 0;
        return FS_OK;
    });
}

fs_status fs_session_open(const char* bundle, const fs_session_options* options, fs_session* session) {
    return call([&] {
        need(session, "session");
        *session = 0;
        need(bundle, "bundle");
        auto opened = std::make_shared<Session>(bundle, options_of(options));
        *session = handles().add(Handles::session_kind, std::move(opened));
        return FS_OK;
    });
}

fs_status fs_session_close(fs_session session) {
    return call([&] {
        const std::shared_ptr<Session> closing = session_of(session);
        closing->close();
        handles().remove_all(closing);
        return FS_OK;
    });
}

fs_status fs_session_describe(fs_session session, fs_session_info* info) {
    return call([&] {
        describe(*session_of(session), info);
        return FS_OK;
    });
}

fs_status fs_graph_describe(fs_session session, size_t index, fs_graph_info* info) {
    return call([&] {
        const std::shared_ptr<Session> open = session_of(session);
        check_out(info, "info");
        check_index(index, open->plan().graphs.size(), "graph");
        const Graph& graph = *open->plan().graphs[index];
        fs_graph_info value{};
        value.name = graph.name.c_str();
        value.file = graph.file.c_str();
        value.inputs = graph.inputs.size();
        value.outputs = graph.outputs.size();
        value.states = graph.states.size();
        value.own_operators = open->engine().own_operators(index);
        write_struct(info, value);
        return FS_OK;
    });
}

fs_status fs_graph_input_describe(fs_session session, size_t graph, size_t index, fs_port_info* info) {
    return call([&] {
        describe_port(*session_of(session), graph, true, index, info);
        return FS_OK;
    });
}

fs_status fs_graph_output_describe(fs_session session, size_t graph, size_t index, fs_port_info* info) {
    return call([&] {
        describe_port(*session_of(session), graph, false, index, info);
        return FS_OK;
    });
}

fs_status fs_state_describe(fs_session session, size_t index, fs_state_info* info) {
    return call([&] {
        describe_state(*session_of(session), index, info);
        return FS_OK;
    });
}

fs_status fs_output_describe(fs_session session, size_t index, fs_output_info* info) {
    return call([&] {
        const std::shared_ptr<Session> open = session_of(session);
        check_out(info, "info");
        fs_output_info value{};
        open->describe_output(index, value);
        write_struct(info, value);
        return FS_OK;
    });
}

fs_status fs_label_name(fs_session session, size_t index, const char** name) {
    return call([&] {
        const std::shared_ptr<Session> open = session_of(session);
        need(name, "name");
        *name = open->label(index);
        return FS_OK;
    });
}

fs_status fs_set_labels(fs_session session, const fs_labels* labels) {
    return call([&] {
        set_labels(session, labels);
        return FS_OK;
    });
}

fs_status fs_warm_up(fs_session session, int32_t steps) {
    return call([&] {
        const std::shared_ptr<Session> open = session_of(session);
        if (steps < 0 || steps > 1000) throw Error(FS_ERROR_ARGUMENT, "steps: expected 0 to 1000");
        open->warm_up(steps);
        return FS_OK;
    });
}

fs_status fs_stream_open(fs_session session, fs_stream* stream) {
    return call([&] {
        need(stream, "stream");
        *stream = 0;
        const std::shared_ptr<Session> open = session_of(session);
        const fs_stream added = handles().add(Handles::stream_kind, open);
        try {
            open->open_stream(added);
        } catch (...) {
            handles().remove(added);
            throw;
        }
        *stream = added;
        return FS_OK;
    });
}

fs_status fs_stream_close(fs_stream stream) {
    return call([&] {
        const std::shared_ptr<Session> session = stream_of(stream);
        session->close_stream(stream);
        handles().remove(stream);
        return FS_OK;
    });
}

fs_status fs_step(fs_session session, fs_frame* frames, size_t count) {
    return call([&] { return step(session, frames, count); });
}

fs_status fs_output(fs_stream stream, size_t index, fs_tensor* tensor) {
    return call([&] {
        const std::shared_ptr<Session> session = stream_of(stream);
        check_out(tensor, "tensor");
        fs_tensor value{};
        session->output(stream, index, value);
        write_struct(tensor, value);
        return FS_OK;
    });
}

fs_status fs_run(fs_stream stream, size_t graph, const fs_input* inputs, size_t count) {
    return call([&] { return run(stream, graph, inputs, count); });
}

fs_status fs_run_output(fs_stream stream, size_t graph, size_t index, fs_tensor* tensor) {
    return call([&] {
        const std::shared_ptr<Session> session = stream_of(stream);
        check_out(tensor, "tensor");
        fs_tensor value{};
        session->run_output(stream, graph, index, value);
        write_struct(tensor, value);
        return FS_OK;
    });
}

int32_t fs_output_valid(fs_stream stream, uint64_t generation) {
    bool valid = false;
    const fs_status status = call([&] {
        valid = stream_of(stream)->output_valid(stream, generation);
        return FS_OK;
    });
    return status == FS_OK && valid ? 1 : 0;
}

fs_status fs_reset(fs_stream stream) {
    return call([&] {
        stream_of(stream)->reset(stream);
        return FS_OK;
    });
}

fs_status fs_position(fs_stream stream, int64_t* position) {
    return call([&] {
        need(position, "position");
        *position = stream_of(stream)->position(stream);
        return FS_OK;
    });
}

fs_status fs_seek(fs_stream stream, int64_t position) {
    return call([&] {
        stream_of(stream)->seek(stream, position);
        return FS_OK;
    });
}

fs_status fs_state_read(fs_stream stream, size_t index, void* data, size_t bytes) {
    return call([&] {
        need(data, "data");
        stream_of(stream)->read_state(stream, index, data, bytes);
        return FS_OK;
    });
}

fs_status fs_state_write(fs_stream stream, size_t index, const void* data, size_t bytes) {
    return call([&] {
        need(data, "data");
        stream_of(stream)->write_state(stream, index, data, bytes);
        return FS_OK;
    });
}

fs_status fs_state_save(fs_stream stream, const char* path) {
    return call([&] {
        need(path, "path");
        stream_of(stream)->save_state(stream, path);
        return FS_OK;
    });
}

fs_status fs_state_load(fs_stream stream, const char* path) {
    return call([&] {
        need(path, "path");
        stream_of(stream)->load_state(stream, path);
        return FS_OK;
    });
}

fs_status fs_drop(fs_stream stream, uint64_t frames) {
    return call([&] {
        stream_of(stream)->drop(stream, frames);
        return FS_OK;
    });
}

fs_status fs_stats_read(fs_stream stream, fs_stats* stats) {
    return call([&] {
        const std::shared_ptr<Session> session = stream_of(stream);
        check_out(stats, "stats");
        fs_stats value{};
        session->stats(stream, value);
        write_struct(stats, value);
        return FS_OK;
    });
}

}  // extern "C"
