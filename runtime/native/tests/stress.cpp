// Everything but engines, from many threads and with every call failing in its turn, over an engine without a model: the
// C functions, handles, sessions, states. For the sanitizers and valgrind; see sanitize.sh.
//
//     framestep_stress BUNDLE FOLDER       the golden steps' bundle, and where states may be written
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fake_engine.h"
#include "framestep.h"

namespace fake = framestep::fake;

namespace {

#define CHECK(condition)                                                                                   \
    do {                                                                                                   \
        if (!(condition)) {                                                                                \
            std::fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, #condition, fs_last_error()); \
            std::abort();                                                                                  \
        }                                                                                                  \
    } while (false)

const char* bundle;
std::string folder;

// The n-th allocation of this thread from now on fails, once.
thread_local long until_no_memory = 0;
thread_local long without_memory = 0;

void* allocate(size_t size) {
    if (until_no_memory > 0 && --until_no_memory == 0) {
        ++without_memory;
        throw std::bad_alloc();
    }
    if (void* memory = std::malloc(size)) return memory;
    throw std::bad_alloc();
}

template <class Struct>
Struct sized() {
    Struct made{};
    made.struct_size = sizeof made;
    return made;
}

fs_status try_open(int streams, fs_session& session, bool trust = true) {
    auto options = sized<fs_session_options>();
    const char* outputs[] = {"pooled", "scores"};
    const char* graphs[] = {"patch_label"};
    options.outputs = outputs;
    options.output_count = 2;
    options.graphs = graphs;
    options.graph_count = 1;
    options.device = "cpu";
    options.precision = "fp32";
    options.streams = streams;
    options.threads = 1;
    options.trust_files = trust;
    return fs_session_open(bundle, &options, &session);
}

fs_session open_session(int streams) {
    fs_session session = 0;
    CHECK(try_open(streams, session) == FS_OK);
    return session;
}

fs_stream open_stream(fs_session session) {
    fs_stream stream = 0;
    CHECK(fs_stream_open(session, &stream) == FS_OK);
    return stream;
}

// A frame of one colour, which stays one when it is resized.
struct Shot {
    static constexpr int HEIGHT = 20, WIDTH = 30;
    fs_frame frame = sized<fs_frame>();
    std::vector<uint8_t> pixels;

    Shot(fs_stream stream, int colour) : pixels(3 * HEIGHT * WIDTH, static_cast<uint8_t>(colour)) {
        frame.stream = stream;
        frame.data = pixels.data();
        frame.width = WIDTH;
        frame.height = HEIGHT;
    }
};

fs_status step(fs_session session, fs_stream stream, int colour) {
    Shot shot(stream, colour);
    return fs_step(session, &shot.frame, 1);
}

int64_t position_of(fs_stream stream) {
    int64_t position = -1;
    CHECK(fs_position(stream, &position) == FS_OK);
    return position;
}

size_t state_bytes(fs_session session) {
    auto info = sized<fs_state_info>();
    CHECK(fs_state_describe(session, 0, &info) == FS_OK);
    return info.bytes;
}

// What the engine should remember of a stream.
struct Ring {
    std::deque<int> colours;

    void add(int colour) {
        colours.push_back(colour);
        if (colours.size() > fake::WINDOW) colours.pop_front();
    }
    float sum() const { return static_cast<float>(std::accumulate(colours.begin(), colours.end(), 0)); }
};

void check_outputs(fs_stream stream, const Ring& ring) {
    for (size_t index = 0; index < 2; ++index) {
        auto tensor = sized<fs_tensor>();
        CHECK(fs_output(stream, index, &tensor) == FS_OK);
        CHECK(fs_output_valid(stream, tensor.generation) == 1);
        const auto* numbers = static_cast<const float*>(tensor.data);
        for (size_t at = 0; at < tensor.bytes / sizeof(float); ++at) CHECK(numbers[at] == ring.sum());
    }
}

template <class... Work>
void at_once(Work... work) {
    std::vector<std::thread> threads;
    (threads.emplace_back(work), ...);
    for (std::thread& thread : threads) thread.join();
}

// A stream's life: every call that one thread may make while others live beside it.
void live(fs_session session, int seed, bool bad_frames) {
    std::mt19937 random(static_cast<unsigned>(seed));
    const std::string path = folder + "/" + std::to_string(seed) + ".state";
    std::vector<uint8_t> state(state_bytes(session));
    for (int life = 0; life < 6; ++life) {
        fs_stream stream = 0;
        const fs_status opened = fs_stream_open(session, &stream);
        if (opened == FS_ERROR_ENGINE) continue;  // every place is taken
        CHECK(opened == FS_OK);
        CHECK(position_of(stream) == 0);
        Ring ring, saved;
        CHECK(fs_state_save(stream, path.c_str()) == FS_OK);
        for (int frame = 0; frame < 20; ++frame) {
            const int colour = static_cast<int>(random() % 255);
            switch (random() % 12) {
                case 0:
                    CHECK(fs_reset(stream) == FS_OK);
                    ring = {};
                    break;
                case 1:
                    CHECK(fs_state_save(stream, path.c_str()) == FS_OK);
                    saved = ring;
                    break;
                case 2:
                    CHECK(fs_state_load(stream, path.c_str()) == FS_OK);
                    ring = saved;
                    break;
                case 3:
                    CHECK(fs_state_read(stream, 0, state.data(), state.size()) == FS_OK);
                    CHECK(fs_state_write(stream, 0, state.data(), state.size()) == FS_OK);
                    break;
                case 4: {
                    auto stats = sized<fs_stats>();
                    CHECK(fs_drop(stream, 1) == FS_OK);
                    CHECK(fs_stats_read(stream, &stats) == FS_OK);
                    CHECK(stats.refused == 0);
                    break;
                }
                case 5:
                    if (!bad_frames) break;
                    CHECK(step(session, stream, 255) == FS_ERROR_NONFINITE);
                    CHECK(position_of(stream) == 0);
                    ring = {};
                    break;
                default: break;
            }
            CHECK(step(session, stream, colour) == FS_OK);
            ring.add(colour);
            check_outputs(stream, ring);
        }
        CHECK(fs_stream_close(stream) == FS_OK);
        CHECK(fs_reset(stream) == FS_ERROR_HANDLE);
    }
}

void streams_open_step_and_close_from_many_threads() {
    const fs_session few = open_session(2), many = open_session(4), single = open_session(1);
    at_once([=] { live(few, 1, true); }, [=] { live(few, 2, false); }, [=] { live(few, 3, false); },
            [=] { live(many, 4, true); }, [=] { live(many, 5, false); }, [=] { live(many, 6, false); },
            [=] { live(single, 7, true); }, [=] { live(single, 8, false); },
            [=] {  // and who only looks
                for (int look = 0; look < 200; ++look) {
                    auto info = sized<fs_session_info>();
                    auto output = sized<fs_output_info>();
                    CHECK(fs_session_describe(many, &info) == FS_OK);
                    CHECK(fs_output_describe(few, 0, &output) == FS_OK);
                }
            });
    for (const fs_session session : {few, many, single}) CHECK(fs_session_close(session) == FS_OK);
}

// Steps over several places at once run through those of others, which lose their outputs and nothing else.
void steps_of_several_streams_leave_the_others_memory_alone() {
    const fs_session session = open_session(5);
    fs_stream streams[5];
    for (fs_stream& stream : streams) stream = open_stream(session);
    Ring rings[5];
    const auto drive = [&](int left, int right) {
        for (int frame = 0; frame < 60; ++frame) {
            Shot shots[] = {{streams[left], frame + left}, {streams[right], frame + right}};
            fs_frame both[] = {shots[0].frame, shots[1].frame};
            CHECK(fs_step(session, both, 2) == FS_OK);
            CHECK(both[0].position == frame && both[1].position == frame);
            rings[left].add(frame + left);
            rings[right].add(frame + right);
        }
    };
    const auto other_calls = [&] {
        const float embeddings[3 * 96] = {};
        auto labels = sized<fs_labels>();
        labels.text_embeddings = labels.patch_text_embeddings = embeddings;
        labels.text_hidden = labels.patch_text_hidden = 96;
        for (int call = 0; call < 20; ++call) {
            labels.count = static_cast<size_t>(call % 3 + 1);
            CHECK(fs_set_labels(session, &labels) == FS_OK);
            CHECK(fs_warm_up(session, 1) == FS_OK);
        }
    };
    at_once([&] { drive(0, 3); }, [&] { drive(1, 4); }, other_calls);
    for (const int slot : {0, 1, 3, 4}) {
        CHECK(position_of(streams[slot]) == 60);
        CHECK(step(session, streams[slot], 7) == FS_OK);
        rings[slot].add(7);
        check_outputs(streams[slot], rings[slot]);
    }
    CHECK(fs_session_close(session) == FS_OK);
}

void graphs_run_by_themselves_beside_steps() {
    const fs_session session = open_session(2);
    const fs_stream streams[] = {open_stream(session), open_stream(session)};
    auto info = sized<fs_session_info>();
    CHECK(fs_session_describe(session, &info) == FS_OK);
    const size_t graph = info.graphs - 1;
    std::vector<float> numbers(16 * 96, 0.5f);
    const auto input = [&](const char* name, std::vector<int64_t> shape) {
        auto made = sized<fs_input>();
        made.name = name;
        made.data = numbers.data();
        made.dtype = FS_FLOAT32;
        made.rank = static_cast<int32_t>(shape.size());
        std::copy(shape.begin(), shape.end(), made.shape);
        return made;
    };
    const fs_input inputs[] = {input("features", {16, 96}), input("patch_text_embeddings", {2, 96}),
                               input("logit_scale", {}), input("logit_bias", {})};
    const auto run = [&](fs_stream stream) {
        for (int turn = 0; turn < 100; ++turn) {
            CHECK(fs_run(stream, graph, inputs, 4) == FS_OK);
            auto tensor = sized<fs_tensor>();
            CHECK(fs_run_output(stream, graph, 0, &tensor) == FS_OK);
            CHECK(tensor.bytes == 2 * 16 * sizeof(float) && static_cast<const float*>(tensor.data)[31] == 1);
        }
    };
    const auto drive = [&](fs_stream stream) {
        for (int frame = 0; frame < 100; ++frame) CHECK(step(session, stream, frame) == FS_OK);
    };
    at_once([&] { run(streams[0]); }, [&] { run(streams[1]); }, [&] { drive(streams[0]); }, [&] { drive(streams[1]); });
    CHECK(fs_session_close(session) == FS_OK);
}

void a_call_that_meets_another_in_its_stream_is_refused_and_does_nothing() {
    const fs_session session = open_session(2);
    const fs_stream stream = open_stream(session), other = open_stream(session);
    Ring ring;
    CHECK(step(session, stream, 5) == FS_OK);
    ring.add(5);
    fake::hold_runs();
    std::thread driver([&] { CHECK(step(session, stream, 9) == FS_OK); });
    fake::wait_for_a_held_run();
    int64_t position = 0;
    auto stats = sized<fs_stats>();
    auto tensor = sized<fs_tensor>();
    std::vector<uint8_t> state(state_bytes(session));
    const std::string path = folder + "/refused.state";
    Shot one(other, 1), two(stream, 2);
    fs_frame both[] = {one.frame, two.frame};
    CHECK(step(session, stream, 1) == FS_ERROR_BUSY);
    CHECK(fs_step(session, both, 2) == FS_ERROR_BUSY);
    CHECK(fs_position(stream, &position) == FS_ERROR_BUSY);
    CHECK(fs_reset(stream) == FS_ERROR_BUSY);
    CHECK(fs_seek(stream, 3) == FS_ERROR_BUSY);
    CHECK(fs_state_read(stream, 0, state.data(), state.size()) == FS_ERROR_BUSY);
    CHECK(fs_state_write(stream, 0, state.data(), state.size()) == FS_ERROR_BUSY);
    CHECK(fs_state_save(stream, path.c_str()) == FS_ERROR_BUSY);
    CHECK(fs_state_load(stream, path.c_str()) == FS_ERROR_BUSY);
    CHECK(fs_drop(stream, 1) == FS_ERROR_BUSY);
    CHECK(fs_stats_read(stream, &stats) == FS_ERROR_BUSY);
    CHECK(fs_stream_close(stream) == FS_ERROR_BUSY);
    CHECK(fs_output(stream, 0, &tensor) == FS_ERROR_STALE);
    CHECK(position_of(other) == 0);  // its neighbour is free
    fake::let_go();
    driver.join();
    ring.add(9);
    CHECK(position_of(stream) == 2);
    check_outputs(stream, ring);
    CHECK(fs_stats_read(stream, &stats) == FS_OK);
    CHECK(stats.frames == 2 && stats.dropped == 0 && stats.refused == 12);
    CHECK(fs_session_close(session) == FS_OK);
}

void two_threads_in_one_stream_take_whole_turns() {
    const fs_session session = open_session(1);
    const fs_stream stream = open_stream(session);
    std::atomic<int> done{0};
    const auto drive = [&] {
        for (int frame = 0; frame < 300; ++frame) {
            const fs_status status = step(session, stream, 1);
            CHECK(status == FS_OK || status == FS_ERROR_BUSY);
            done += status == FS_OK;
        }
    };
    at_once(drive, drive);
    CHECK(position_of(stream) == done);
    CHECK(fs_session_close(session) == FS_OK);
}

void closing_waits_for_the_step_at_work() {
    const fs_session session = open_session(2);
    const fs_stream stream = open_stream(session);
    fake::hold_runs();
    std::thread driver([&] { CHECK(step(session, stream, 9) == FS_OK); });
    fake::wait_for_a_held_run();
    std::atomic<bool> closed{false};
    std::thread closer([&] {
        CHECK(fs_session_close(session) == FS_OK);
        closed = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(!closed);
    fake::let_go();
    driver.join();
    closer.join();
    CHECK(fs_position(stream, nullptr) == FS_ERROR_ARGUMENT);
    CHECK(step(session, stream, 1) == FS_ERROR_HANDLE);
    CHECK(fs_reset(stream) == FS_ERROR_HANDLE);
    CHECK(fs_session_close(session) == FS_ERROR_HANDLE);
}

void a_session_may_be_closed_at_any_moment() {
    for (int round = 0; round < 15; ++round) {
        const fs_session session = open_session(3);
        const auto drive = [=] {
            fs_stream stream = 0;
            for (int frame = 0; frame < 1000; ++frame) {
                if (stream == 0 && fs_stream_open(session, &stream) != FS_OK) return;
                const fs_status status = step(session, stream, 3);
                CHECK(status == FS_OK || status == FS_ERROR_HANDLE);
                if (status != FS_OK) return;
                if (frame % 7 == 6) {
                    const fs_status gone = fs_stream_close(stream);
                    CHECK(gone == FS_OK || gone == FS_ERROR_HANDLE);
                    stream = 0;
                }
            }
        };
        at_once(drive, drive, drive, [=] {
            std::this_thread::sleep_for(std::chrono::microseconds(300 * round));
            CHECK(fs_session_close(session) == FS_OK);
        });
    }
}

// Everything that reaches the engine. `may_fail` makes each call; one that failed is made again and then succeeds.
template <class MayFail>
void use_everything(MayFail may_fail) {
    fs_session session = 0;
    may_fail([&] { return try_open(2, session); }, FS_OK);
    fs_stream first = 0, second = 0;
    may_fail([&] { return fs_stream_open(session, &first); }, FS_OK);
    may_fail([&] { return fs_stream_open(session, &second); }, FS_OK);
    may_fail([&] { return fs_warm_up(session, 1); }, FS_OK);
    Ring ring;
    for (const int colour : {1, 2, 3}) {
        may_fail([&] { return step(session, first, colour); }, FS_OK);
        ring.add(colour);
        CHECK(position_of(first) == colour);
        check_outputs(first, ring);
    }
    const std::string path = folder + "/everything.state";
    may_fail([&] { return fs_state_save(first, path.c_str()); }, FS_OK);
    std::vector<uint8_t> state(state_bytes(session));
    may_fail([&] { return fs_state_read(first, 0, state.data(), state.size()); }, FS_OK);
    may_fail([&] { return fs_state_write(first, 0, state.data(), state.size()); }, FS_OK);
    Shot sick(second, 255), well(first, 4);
    fs_frame both[] = {well.frame, sick.frame};
    may_fail([&] { return fs_step(session, both, 2); }, FS_ERROR_NONFINITE);
    CHECK(both[0].status == FS_OK && both[1].status == FS_ERROR_NONFINITE);
    CHECK(position_of(first) == 4 && position_of(second) == 0);
    may_fail([&] { return fs_state_load(second, path.c_str()); }, FS_OK);
    CHECK(position_of(second) == 3);
    may_fail([&] { return step(session, second, 4); }, FS_OK);
    ring.add(4);
    check_outputs(second, ring);
    const float embeddings[2 * 96] = {};
    auto labels = sized<fs_labels>();
    labels.count = 2;
    labels.text_embeddings = labels.patch_text_embeddings = embeddings;
    labels.text_hidden = labels.patch_text_hidden = 96;
    may_fail([&] { return fs_set_labels(session, &labels); }, FS_OK);
    may_fail([&] { return step(session, first, 5); }, FS_OK);
    ring.add(5);
    check_outputs(first, ring);
    may_fail([&] { return fs_stream_close(second); }, FS_OK);
    may_fail([&] { return fs_session_close(session); }, FS_OK);
}

void an_engine_that_fails_at_any_call_breaks_nothing() {
    for (long call = 1;; ++call) {
        const long before = fake::failures();
        fake::fail_call(call);
        use_everything([](auto function, fs_status expected) {
            const long seen = fake::failures();
            fs_status status = function();
            if (fake::failures() != seen) {
                CHECK(status == FS_ERROR_ENGINE);
                CHECK(std::strstr(fs_last_error(), "failed as told") != nullptr);
                status = function();
            }
            CHECK(status == expected);
        });
        fake::fail_call(0);
        if (fake::failures() != before) continue;
        CHECK(call > 20);  // it did fail
        return;
    }
}

void memory_that_runs_out_at_any_allocation_breaks_nothing() {
    for (long allocation = 1;; allocation += 1 + allocation / 24) {
        const long before = without_memory;
        long left = allocation;  // of the calls alone: what lies between them is not ours
        use_everything([&](auto function, fs_status expected) {
            const auto try_it = [&] {
                try {
                    return function();
                } catch (const std::bad_alloc&) {  // in the caller's own part
                    return FS_ERROR_MEMORY;
                }
            };
            const long seen = without_memory;
            until_no_memory = left;
            fs_status status = try_it();
            left = std::exchange(until_no_memory, 0);
            if (without_memory != seen && status != expected) {  // some of the standard library does without
                CHECK(status == FS_ERROR_MEMORY);
                status = try_it();
            }
            CHECK(status == expected);
        });
        if (without_memory == before) return;
    }
}

}  // namespace

void* operator new(size_t size) { return allocate(size); }
void* operator new(size_t size, const std::nothrow_t&) noexcept {
    try {
        return allocate(size);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

int main(int count, char** arguments) {
    if (count != 3) return 2;
    bundle = arguments[1];
    folder = arguments[2];
    fs_session session = 0;
    CHECK(try_open(1, session, false) == FS_OK);  // with all files checked, in several threads
    CHECK(fs_session_close(session) == FS_OK);
    a_call_that_meets_another_in_its_stream_is_refused_and_does_nothing();
    closing_waits_for_the_step_at_work();
    two_threads_in_one_stream_take_whole_turns();
    streams_open_step_and_close_from_many_threads();
    steps_of_several_streams_leave_the_others_memory_alone();
    graphs_run_by_themselves_beside_steps();
    a_session_may_be_closed_at_any_moment();
#ifndef __SANITIZE_THREAD__  // one thread alone, in which that sanitizer has nothing to find; the others see it
    an_engine_that_fails_at_any_call_breaks_nothing();
    memory_that_runs_out_at_any_allocation_breaks_nothing();
#endif
    std::puts("ok");
    return 0;
}
