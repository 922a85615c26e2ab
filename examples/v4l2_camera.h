// A V4L2 camera that gives its newest frame.
#pragma once

#include <linux/videodev2.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "pixels.h"

struct CameraOptions {
    std::string device = "/dev/video0";
    int width = 640;  // a wish: the camera takes the nearest size that it has
    int height = 480;
    std::string format;  // "yuyv" or "mjpeg"; empty: YUYV where the camera has it, otherwise MJPEG
    double rate = 0;     // frames a second to be taken; 0: every one
};

// One line that begins with the device.
class CameraError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// Frames lie in buffers that the driver and this program share. A thread takes each as it comes and gives the one before
// back to the driver if nobody took it meanwhile; so there is always a buffer for the driver to fill, and what `take`
// gives is never older than one frame.
class Camera {
public:
    // Opens the device and starts it. CameraError.
    explicit Camera(CameraOptions options);
    ~Camera();
    Camera(const Camera&) = delete;
    Camera& operator=(const Camera&) = delete;

    int width() const { return width_; }
    int height() const { return height_; }
    const char* format() const { return pixel_format_ == V4L2_PIX_FMT_YUYV ? "yuyv" : "mjpeg"; }

    // Waits for a frame newer than the last one taken. False: `stop` was set meanwhile.
    // CameraError: the camera is gone, or has sent no usable frame for 5 seconds.
    bool take(Picture& picture, const std::atomic<bool>& stop);

    // Frames let go since the last call: those that newer ones replaced, that the driver lost, and that were damaged.
    uint64_t dropped() { return dropped_.exchange(0); }

private:
    struct Buffer {
        void* data;
        size_t length;
    };
    struct Frame {
        uint32_t buffer;
        size_t bytes;
    };

    void open_device();
    uint32_t choose_format() const;
    void set_format(uint32_t pixel_format);
    void share_buffers();
    void start();
    void close();

    void read_frames();                       // the thread
    std::optional<v4l2_buffer> next_frame();  // none yet: empty
    bool due(std::chrono::steady_clock::time_point now);
    void publish(const Frame& frame);
    void record(const CameraError& error);  // for `take` to throw

    bool convert(const Frame& frame, Picture& picture) const;
    void give_back(uint32_t buffer);
    [[noreturn]] void fail(const std::string& what) const;
    [[noreturn]] void fail_by(const char* doing, int error) const;

    const CameraOptions options_;
    int file_ = -1;
    bool streaming_ = false;
    uint32_t pixel_format_ = 0;
    int width_ = 0;
    int height_ = 0;
    size_t stride_ = 0;  // of YUYV, bytes
    std::vector<Buffer> buffers_;

    // of the thread
    std::optional<uint32_t> last_sequence_;
    std::optional<std::chrono::steady_clock::time_point> next_due_;

    std::atomic<bool> closing_{false};
    std::atomic<uint64_t> dropped_{0};
    std::mutex lock_;
    std::condition_variable changed_;
    std::optional<Frame> newest_;  // under lock_
    std::string error_;            // under lock_
    std::thread thread_;
};
