// The TensorRT engine over stand-ins for the driver and for TensorRT: what it binds, captures, launches and gives back. It
// says nothing of a GPU's own behaviour.
//
//     rehearsal BUNDLE NVINFER FOLDER       a bundle with engines for the stand-in, the stand-in, where states may be written
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <numeric>
#include <string>
#include <vector>

#include "framestep.h"
#include "stand_in.h"

namespace {

#define CHECK(condition)                                                                                   \
    do {                                                                                                   \
        if (!(condition)) {                                                                                \
            std::fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, #condition, fs_last_error()); \
            std::abort();                                                                                  \
        }                                                                                                  \
    } while (false)

constexpr size_t WINDOW = 8;
const char *bundle, *library;
std::string folder;

template <class Struct>
Struct sized() {
    Struct made{};
    made.struct_size = sizeof made;
    return made;
}

fs_status try_open(int streams, fs_session& session, const char* engine = "tensorrt", bool scores = true) {
    auto options = sized<fs_session_options>();
    const char* outputs[] = {"pooled", "scores"};
    options.outputs = outputs;
    options.output_count = scores ? 2 : 1;
    options.engine = engine;
    options.library = library;
    options.streams = streams;
    return fs_session_open(bundle, &options, &session);
}

struct Camera {
    fs_stream stream = 0;
    std::deque<int> seen;

    explicit Camera(fs_session session) { CHECK(fs_stream_open(session, &stream) == FS_OK); }
    float sum() const { return static_cast<float>(std::accumulate(seen.begin(), seen.end(), 0)); }
};

fs_status step(fs_session session, std::vector<std::pair<Camera*, int>> shots) {
    std::vector<std::vector<uint8_t>> pixels;
    std::vector<fs_frame> frames;
    for (const auto& [camera, colour] : shots) {
        pixels.emplace_back(3 * 20 * 20, static_cast<uint8_t>(colour));
        auto frame = sized<fs_frame>();
        frame.stream = camera->stream;
        frame.data = pixels.back().data();
        frame.width = frame.height = 20;
        frames.push_back(frame);
    }
    const fs_status status = fs_step(session, frames.data(), frames.size());
    for (size_t index = 0; index < shots.size() && (status == FS_OK || status == FS_ERROR_NONFINITE); ++index) {
        std::deque<int>& seen = shots[index].first->seen;
        if (frames[index].status != FS_OK) {
            seen.clear();
            continue;
        }
        seen.push_back(shots[index].second);
        if (seen.size() > WINDOW) seen.pop_front();
    }
    return status;
}

void check_outputs(const Camera& camera) {
    for (size_t index = 0; index < 2; ++index) {
        auto tensor = sized<fs_tensor>();
        CHECK(fs_output(camera.stream, index, &tensor) == FS_OK);
        const auto* numbers = static_cast<const float*>(tensor.data);
        for (size_t at = 0; at < tensor.bytes / sizeof(float); ++at) {
            CHECK(numbers[at] == camera.sum() + (index == 0 ? 0 : static_cast<float>(at)));  // label c adds c
        }
    }
}

fs_status label(fs_session session, size_t count) {
    std::vector<float> embeddings(count * 96);
    for (size_t at = 0; at < count; ++at) embeddings[at * 96] = static_cast<float>(at);
    auto labels = sized<fs_labels>();
    labels.count = count;
    labels.text_embeddings = labels.patch_text_embeddings = embeddings.data();
    labels.text_hidden = labels.patch_text_hidden = 96;
    return fs_set_labels(session, &labels);
}

void a_bundle_with_engines_for_this_machine_runs_on_them() {
    fs_session session = 0;
    CHECK(try_open(2, session) == FS_OK);
    auto info = sized<fs_session_info>();
    CHECK(fs_session_describe(session, &info) == FS_OK);
    CHECK(std::string(info.engine) == "tensorrt" && std::string(info.device) == "cuda");
    CHECK(std::string(info.precision) == "fp32");  // what it was built for, and not the bundle's own
    CHECK(std::strstr(info.library_version, ".99.1.2") != nullptr && std::string(info.library) == library);
    CHECK(fs_session_close(session) == FS_OK);
    CHECK(try_open(13, session) == FS_ERROR_ENGINE);
    CHECK(std::strstr(fs_last_error(), "takes at most 12 streams, and 13 are asked for; run 'framestep build") != nullptr);
}

void streams_are_remembered_apart() {
    fs_session session = 0;
    CHECK(try_open(4, session) == FS_OK);
    CHECK(label(session, 5) == FS_OK);
    Camera one(session), two(session), three(session), four(session);
    for (int frame = 0; frame < 20; ++frame) {
        CHECK(step(session, {{&one, frame}}) == FS_OK);
        check_outputs(one);
        CHECK(step(session, {{&two, frame + 50}, {&four, 7}}) == FS_OK);  // over the third, which keeps its memory
        check_outputs(two);
        check_outputs(four);
        if (frame % 3 != 0) continue;
        CHECK(step(session, {{&three, 2 * frame}}) == FS_OK);
        check_outputs(three);
        check_outputs(four);
    }
    CHECK(fs_reset(two.stream) == FS_OK);
    two.seen.clear();
    CHECK(step(session, {{&two, 3}}) == FS_OK);
    check_outputs(two);
    CHECK(label(session, 3) == FS_OK);
    CHECK(label(session, 17) == FS_ERROR_ENGINE);
    CHECK(std::strstr(fs_last_error(), "17 labels are more than the 16") != nullptr);
    CHECK(step(session, {{&one, 9}, {&four, 9}}) == FS_OK);
    check_outputs(one);
    check_outputs(four);
    CHECK(fs_session_close(session) == FS_OK);
}

void a_frame_is_one_launch_and_one_wait() {
    fs_session session = 0;
    CHECK(try_open(3, session) == FS_OK);
    CHECK(label(session, 2) == FS_OK);
    Camera one(session), two(session), three(session);
    CHECK(fs_warm_up(session, 2) == FS_OK);
    auto state = sized<fs_state_info>();
    CHECK(fs_state_describe(session, 1, &state) == FS_OK);
    const uintptr_t address = state.address;
    const char* others[] = {"cuMemAlloc", "cuMemAllocHost", "cuGraphInstantiate", "upload", "download", "copy", "enqueue"};
    std::vector<long> before;
    for (const char* name : others) before.push_back(stand_in_count(name));
    const long launches = stand_in_count("launch"), waits = stand_in_count("wait");
    for (int frame = 0; frame < 20; ++frame) CHECK(step(session, {{&one, frame}, {&two, frame}, {&three, frame}}) == FS_OK);
    CHECK(stand_in_count("launch") == launches + 20 && stand_in_count("wait") == waits + 20);
    for (size_t index = 0; index < before.size(); ++index) CHECK(stand_in_count(others[index]) == before[index]);
    CHECK(fs_state_describe(session, 1, &state) == FS_OK && state.address == address);
    CHECK(fs_session_close(session) == FS_OK);
}

void what_nobody_asked_for_stays_on_the_device() {
    fs_session session = 0;
    CHECK(try_open(1, session, "tensorrt", false) == FS_OK);
    Camera camera(session);
    const long before = stand_in_count("download");
    CHECK(step(session, {{&camera, 1}}) == FS_OK);
    CHECK(stand_in_count("download") == before + 3);  // one output, in two runs before the capture and in the captured one
    CHECK(fs_session_close(session) == FS_OK);
}

void states_are_read_written_saved_and_zeroed() {
    fs_session session = 0;
    CHECK(try_open(2, session) == FS_OK);
    CHECK(label(session, 1) == FS_OK);
    Camera one(session), two(session);
    for (int frame = 1; frame < 6; ++frame) CHECK(step(session, {{&one, frame}, {&two, 10 * frame}}) == FS_OK);
    const std::string path = folder + "/rehearsal.state";
    CHECK(fs_state_save(one.stream, path.c_str()) == FS_OK);
    CHECK(fs_state_load(two.stream, path.c_str()) == FS_OK);
    two.seen = one.seen;
    CHECK(step(session, {{&two, 6}}) == FS_OK);
    check_outputs(two);
    auto info = sized<fs_state_info>();
    CHECK(fs_state_describe(session, 0, &info) == FS_OK);
    std::vector<float> memory(info.bytes / sizeof(float));
    CHECK(fs_state_read(one.stream, 0, memory.data(), info.bytes) == FS_OK);
    CHECK(memory[0] == 1 && memory[4] == 5 && memory[5] == 0);
    memory[0] = 100;
    CHECK(fs_state_write(one.stream, 0, memory.data(), info.bytes) == FS_OK);
    one.seen[0] = 100;
    CHECK(step(session, {{&one, 6}, {&two, 255}}) == FS_ERROR_NONFINITE);
    check_outputs(one);
    CHECK(fs_state_read(two.stream, 0, memory.data(), info.bytes) == FS_OK);
    for (const float number : memory) CHECK(number == 0);
    CHECK(step(session, {{&two, 4}}) == FS_OK);
    check_outputs(two);
    CHECK(fs_session_close(session) == FS_OK);
}

void captured_ranges_are_bounded() {
    fs_session session = 0;
    CHECK(try_open(12, session) == FS_OK);
    CHECK(label(session, 1) == FS_OK);
    std::vector<Camera> cameras;
    for (int slot = 0; slot < 12; ++slot) cameras.emplace_back(session);
    for (size_t first = 0; first < cameras.size(); ++first) {
        for (size_t last = first + 1; last < cameras.size(); ++last) {
            CHECK(step(session, {{&cameras[first], 1}, {&cameras[last], 1}}) == FS_OK);
        }
    }
    CHECK(stand_in_count("graphs") == 64);
    for (Camera& camera : cameras) CHECK(step(session, {{&camera, 2}}) == FS_OK);
    for (const Camera& camera : cameras) check_outputs(camera);
    CHECK(fs_session_close(session) == FS_OK);
}

void a_lost_device_is_one_line_and_closing_still_works() {
    fs_session session = 0;
    CHECK(try_open(1, session) == FS_OK);
    CHECK(label(session, 1) == FS_OK);
    Camera camera(session);
    CHECK(step(session, {{&camera, 1}}) == FS_OK);
    stand_in_lose(1);
    for (int again = 0; again < 2; ++again) {
        CHECK(step(session, {{&camera, 1}}) == FS_ERROR_ENGINE);
        CHECK(std::strstr(fs_last_error(), "the GPU failed or was lost (CUDA_ERROR_ILLEGAL_ADDRESS)") != nullptr);
        stand_in_lose(0);  // too late
    }
    CHECK(fs_session_close(session) == FS_OK);
}

void too_little_memory_says_how_much_was_needed_and_free() {
    const size_t before = stand_in_free(60000);
    fs_session session = 0;
    CHECK(try_open(4, session) == FS_ERROR_MEMORY && session == 0);
    CHECK(std::strstr(fs_last_error(), "no memory on the GPU for ") != nullptr);
    CHECK(std::strstr(fs_last_error(), " bytes are needed and ") != nullptr);
    stand_in_free(before);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) return 2;
    bundle = arguments[1];
    library = arguments[2];
    folder = arguments[3];
    void (*const parts[])() = {
        a_bundle_with_engines_for_this_machine_runs_on_them, streams_are_remembered_apart, a_frame_is_one_launch_and_one_wait,
        what_nobody_asked_for_stays_on_the_device, states_are_read_written_saved_and_zeroed, captured_ranges_are_bounded,
        a_lost_device_is_one_line_and_closing_still_works, too_little_memory_says_how_much_was_needed_and_free,
    };
    for (const auto part : parts) {
        part();
        CHECK(stand_in_held() == 0);  // everything was given back
    }
    std::puts("ok");
    return 0;
}
