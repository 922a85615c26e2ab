// Names what a V4L2 camera sees: reads the camera itself, steps the bundle on its newest frame and prints the likeliest
// label of each.
//
//     camera --device /dev/video0 --width 1280 --height 720 --format mjpeg streamformer.bundle
//
// Ctrl-C ends it. Frames that came while the model was busy are dropped, and counted at the end. Errors are one line on
// standard error. Exit status: 0 after Ctrl-C or --frames, 1 when something failed, 2 for wrong options.
#include <framestep.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "v4l2_camera.h"

namespace {

constexpr int MAX_SIDE = 16384;
constexpr const char* USAGE =
    "usage: camera [options] BUNDLE\n"
    "  --device  of the camera; /dev/video0 if not given\n"
    "  --width, --height  of its frames in pixels, 640 by 480 if not given; the camera takes the nearest it has\n"
    "  --format  yuyv or mjpeg; the first of them that the camera has if not given\n"
    "  --frames  how many to step; without end if not given\n"
    "FRAMESTEP_ONNXRUNTIME in the environment is the path of ONNX Runtime's shared library.\n";

std::atomic<bool> stop{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler sets it");

struct WrongOptions : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Options {
    CameraOptions camera;
    std::string bundle;
    int frames = 0;
};

int number_of(const std::string& name, const std::string& value, int most) {
    char* end;
    const long number = std::strtol(value.c_str(), &end, 10);
    if (*end != '\0' || number < 1 || number > most) {
        throw WrongOptions(name + " is '" + value + "': expected 1 to " + std::to_string(most));
    }
    return static_cast<int>(number);
}

Options read_options(const std::vector<std::string>& words) {
    Options options;
    for (size_t index = 0; index < words.size(); ++index) {
        const std::string& name = words[index];
        if (name.rfind("--", 0) != 0) {
            if (!options.bundle.empty()) throw WrongOptions("'" + name + "': one bundle was named already");
            options.bundle = name;
            continue;
        }
        if (++index == words.size()) throw WrongOptions(name + " needs a value");
        const std::string& value = words[index];
        if (name == "--device") {
            options.camera.device = value;
        } else if (name == "--width") {
            options.camera.width = number_of(name, value, MAX_SIDE);
        } else if (name == "--height") {
            options.camera.height = number_of(name, value, MAX_SIDE);
        } else if (name == "--frames") {
            options.frames = number_of(name, value, 1 << 30);
        } else if (name == "--format" && (value == "yuyv" || value == "mjpeg")) {
            options.camera.format = value;
        } else if (name == "--format") {
            throw WrongOptions("--format is '" + value + "': expected yuyv or mjpeg");
        } else {
            throw WrongOptions(name + " is unknown; --help lists the options");
        }
    }
    if (options.bundle.empty()) throw WrongOptions("expected a bundle; --help lists the options");
    return options;
}

void check(fs_status status) {
    if (status != FS_OK) throw std::runtime_error(fs_last_error());
}

// A struct of the interface: zeroed, and knowing its size.
template <class Struct>
Struct made() {
    Struct value{};
    value.struct_size = sizeof value;
    return value;
}

// A session with one stream, and its labels.
class Model {
public:
    explicit Model(const std::string& bundle) {
        const char* const outputs[] = {"scores"};
        auto options = made<fs_session_options>();
        options.outputs = outputs;
        options.output_count = 1;
        check(fs_session_open(bundle.c_str(), &options, &session_));
        try {
            open_stream(bundle);
        } catch (...) {
            fs_session_close(session_);
            throw;
        }
    }
    ~Model() { fs_session_close(session_); }
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    double rate() const { return rate_; }

    // Steps a picture and prints its likeliest label.
    void step(const Picture& picture) {
        auto frame = made<fs_frame>();
        frame.stream = stream_;
        frame.data = picture.rgb.data();
        frame.width = picture.width;
        frame.height = picture.height;
        frame.format = FS_RGB;
        const fs_status status = fs_step(session_, &frame, 1);
        if (status == FS_ERROR_NONFINITE) {  // the stream starts again by itself
            std::fprintf(stderr, "camera: %s\n", fs_last_error());
            return;
        }
        check(status);
        auto tensor = made<fs_tensor>();
        check(fs_output(stream_, 0, &tensor));
        const auto* scores = static_cast<const float*>(tensor.data);  // borrowed until the next step
        const size_t best = std::max_element(scores, scores + labels_.size()) - scores;
        std::printf("%lld  %s  %.4f\n", static_cast<long long>(frame.position), labels_[best].c_str(), scores[best]);
        if (std::fflush(stdout) != 0) throw std::runtime_error("standard output cannot be written");
    }

    void drop(uint64_t frames) { check(fs_drop(stream_, frames)); }

    void print_figures() {
        auto stats = made<fs_stats>();
        check(fs_stats_read(stream_, &stats));
        std::fprintf(stderr, "camera: %llu frames stepped, %llu dropped; a step took %.1f ms (p50), %.1f ms (p99)\n",
                     static_cast<unsigned long long>(stats.frames), static_cast<unsigned long long>(stats.dropped),
                     stats.p50_ms, stats.p99_ms);
    }

private:
    void open_stream(const std::string& bundle) {
        auto info = made<fs_session_info>();
        check(fs_session_describe(session_, &info));
        if (info.labels == 0) {
            throw std::runtime_error(bundle + ": has no labels; framestep label " + bundle +
                                     " --labels FILE gives it some");
        }
        for (size_t index = 0; index < info.labels; ++index) {
            const char* name;
            check(fs_label_name(session_, index, &name));
            labels_.emplace_back(name);
        }
        rate_ = info.rate;
        check(fs_warm_up(session_, 2));
        check(fs_stream_open(session_, &stream_));
    }

    fs_session session_ = 0;
    fs_stream stream_ = 0;
    std::vector<std::string> labels_;
    double rate_ = 0;
};

// The model first: a camera fills its buffers from the moment at which it is opened.
void run(Options options) {
    Model model(options.bundle);
    options.camera.rate = model.rate();
    Camera camera(options.camera);
    std::fprintf(stderr, "camera: %s, %dx%d, %s\n", options.camera.device.c_str(), camera.width(), camera.height(),
                 camera.format());
    const auto finish = [&] {
        model.drop(camera.dropped());
        model.print_figures();
    };
    Picture picture;
    try {
        for (int frame = 0; (options.frames == 0 || frame < options.frames) && camera.take(picture, stop); ++frame) {
            model.step(picture);
        }
    } catch (const CameraError&) {
        finish();
        throw;
    }
    finish();
}

void ask_to_stop(int) { stop = true; }

}  // namespace

int main(int count, char** arguments) {
    const std::vector<std::string> words(arguments + 1, arguments + count);
    if (std::find(words.begin(), words.end(), "--help") != words.end()) return std::fputs(USAGE, stdout) < 0 ? 1 : 0;
    struct sigaction action {};
    action.sa_handler = ask_to_stop;
    action.sa_flags = SA_RESETHAND;  // a second Ctrl-C ends the program at once
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    try {
        run(read_options(words));
    } catch (const WrongOptions& error) {
        std::fprintf(stderr, "camera: %s\n", error.what());
        return 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "camera: %s\n", error.what());
        return 1;
    }
    return 0;
}
