#include "v4l2_camera.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t BUFFERS = 4;  // one with the program, the newest, and two for the driver to fill
constexpr uint32_t FEWEST_BUFFERS = 3;
constexpr int MAX_SIDE = 16384;  // of a frame, see framestep.h
constexpr int POLL_MS = 100;     // how soon the thread sees that it has to end
constexpr auto STALL = std::chrono::seconds(5);

int control(int file, unsigned long request, void* argument) {
    int result;
    do {
        result = ioctl(file, request, argument);
    } while (result < 0 && errno == EINTR);
    return result;
}

// "YUYV", as the four bytes of a format's number spell it.
std::string name_of(uint32_t pixel_format) {
    std::string name;
    for (int shift = 0; shift < 32; shift += 8) name += static_cast<char>(pixel_format >> shift & 0x7f);
    return name.substr(0, name.find_last_not_of(' ') + 1);
}

v4l2_buffer empty_buffer() {
    v4l2_buffer buffer{};
    buffer.type = V4L2_BUF_TYPE_VIDEO_CAPTURE;
    buffer.memory = V4L2_MEMORY_MMAP;
    return buffer;
}

}  // namespace

Camera::Camera(CameraOptions options) : options_(std::move(options)) {
    try {
        open_device();
        set_format(choose_format());
        share_buffers();
        start();
        thread_ = std::thread(&Camera::read_frames, this);
    } catch (...) {
        close();
        throw;
    }
}

Camera::~Camera() {
    closing_ = true;
    thread_.join();
    close();
}

void Camera::open_device() {
    file_ = open(options_.device.c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (file_ < 0) fail_by("opened", errno);
    v4l2_capability capability{};
    if (control(file_, VIDIOC_QUERYCAP, &capability) < 0) fail("is not a V4L2 camera");
    const bool own = (capability.capabilities & V4L2_CAP_DEVICE_CAPS) != 0;
    const uint32_t can = own ? capability.device_caps : capability.capabilities;
    if ((can & V4L2_CAP_VIDEO_CAPTURE) == 0)
        fail("does not capture video; a camera may have several devices, try its others");
    if ((can & V4L2_CAP_STREAMING) == 0) fail("has no streaming buffers, which this program needs");
}

uint32_t Camera::choose_format() const {
    std::vector<uint32_t> offered;
    std::string names;
    v4l2_fmtdesc entry{};
    entry.type = V4L2_BUF_TYPE_VIDEO_CAPTURE;
    for (; control(file_, VIDIOC_ENUM_FMT, &entry) == 0; ++entry.index) {
        offered.push_back(entry.pixelformat);
        names += (names.empty() ? "" : ", ") + name_of(entry.pixelformat);
    }
    const auto offers = [&](uint32_t format) {
        return std::find(offered.begin(), offered.end(), format) != offered.end();
    };
    uint32_t wanted = V4L2_PIX_FMT_YUYV;
    const bool choose = options_.format.empty();
    if (options_.format == "mjpeg" || (choose && !offers(V4L2_PIX_FMT_YUYV))) wanted = V4L2_PIX_FMT_MJPEG;
    if (offered.empty()) fail("names no format that it can send");
    if (!offers(wanted)) {
        fail("does not offer " + (choose ? "YUYV or MJPEG" : options_.format) + ", only " + names);
    }
    if (wanted == V4L2_PIX_FMT_MJPEG && !can_decode_jpeg()) {
        fail(std::string("would send MJPEG, and this program was built without libjpeg; ") +
             (offers(V4L2_PIX_FMT_YUYV) ? "take --format yuyv, or " : "") + "install libjpeg-dev and build again");
    }
    return wanted;
}

void Camera::set_format(uint32_t pixel_format) {
    v4l2_format format{};
    format.type = V4L2_BUF_TYPE_VIDEO_CAPTURE;
    v4l2_pix_format& pixels = format.fmt.pix;
    pixels.width = options_.width;
    pixels.height = options_.height;
    pixels.pixelformat = pixel_format;
    pixels.field = V4L2_FIELD_ANY;
    if (control(file_, VIDIOC_S_FMT, &format) < 0) fail_by("set to a format", errno);
    if (pixels.pixelformat != pixel_format) {
        fail("gives " + name_of(pixels.pixelformat) + " where " + name_of(pixel_format) + " was asked for");
    }
    const bool yuyv = pixel_format == V4L2_PIX_FMT_YUYV;
    const bool possible = pixels.width >= 1 && pixels.height >= 1 && pixels.width <= MAX_SIDE &&
                          pixels.height <= MAX_SIDE &&
                          (!yuyv || (pixels.width % 2 == 0 && pixels.bytesperline >= 2 * pixels.width));
    if (!possible)
        fail("gives frames of " + std::to_string(pixels.width) + "x" + std::to_string(pixels.height) +
             ", which cannot be");
    pixel_format_ = pixel_format;
    width_ = static_cast<int>(pixels.width);
    height_ = static_cast<int>(pixels.height);
    stride_ = pixels.bytesperline;
}

void Camera::share_buffers() {
    v4l2_requestbuffers request{};
    request.count = BUFFERS;
    request.type = V4L2_BUF_TYPE_VIDEO_CAPTURE;
    request.memory = V4L2_MEMORY_MMAP;
    if (control(file_, VIDIOC_REQBUFS, &request) < 0) fail_by("asked for buffers", errno);
    if (request.count < FEWEST_BUFFERS) {
        fail("has " + std::to_string(request.count) + " buffers, and this program needs " +
             std::to_string(FEWEST_BUFFERS));
    }
    for (uint32_t index = 0; index < request.count; ++index) {
        v4l2_buffer buffer = empty_buffer();
        buffer.index = index;
        if (control(file_, VIDIOC_QUERYBUF, &buffer) < 0) fail_by("asked for its buffers' place", errno);
        void* data = mmap(nullptr, buffer.length, PROT_READ | PROT_WRITE, MAP_SHARED, file_, buffer.m.offset);
        if (data == MAP_FAILED) fail_by("mapped", errno);
        buffers_.push_back({data, buffer.length});
    }
}

void Camera::start() {
    for (uint32_t index = 0; index < buffers_.size(); ++index) give_back(index);
    int type = V4L2_BUF_TYPE_VIDEO_CAPTURE;
    if (control(file_, VIDIOC_STREAMON, &type) < 0) fail_by("started", errno);
    streaming_ = true;
}

void Camera::close() {
    int type = V4L2_BUF_TYPE_VIDEO_CAPTURE;
    if (streaming_) control(file_, VIDIOC_STREAMOFF, &type);
    for (const Buffer& buffer : buffers_) munmap(buffer.data, buffer.length);
    if (file_ >= 0) ::close(file_);
}

bool Camera::take(Picture& picture, const std::atomic<bool>& stop) {
    const Clock::time_point until = Clock::now() + STALL;
    while (!stop) {
        std::optional<Frame> frame;
        {
            std::unique_lock guard(lock_);
            changed_.wait_for(guard, std::chrono::milliseconds(POLL_MS), [&] { return newest_ || !error_.empty(); });
            frame = std::exchange(newest_, std::nullopt);
            if (!frame && !error_.empty()) throw CameraError(error_);
        }
        if (frame) {
            const bool usable = convert(*frame, picture);
            try {
                give_back(frame->buffer);
            } catch (const CameraError& error) {  // this frame is good, the next call says it
                record(error);
            }
            if (usable) return true;
            ++dropped_;
        }
        if (Clock::now() > until) fail("has sent no usable frame for 5 seconds");
    }
    return false;
}

bool Camera::convert(const Frame& frame, Picture& picture) const {
    const auto* data = static_cast<const uint8_t*>(buffers_[frame.buffer].data);
    if (pixel_format_ == V4L2_PIX_FMT_MJPEG) return jpeg_to_rgb(data, frame.bytes, picture);
    const size_t expected = stride_ * (height_ - 1) + size_t{2} * width_;
    if (frame.bytes < expected) return false;  // cut short on its way
    yuyv_to_rgb(data, width_, height_, stride_, picture);
    return true;
}

void Camera::read_frames() {
    try {
        while (!closing_) {
            const std::optional<v4l2_buffer> buffer = next_frame();
            if (!buffer) continue;
            if (last_sequence_ && buffer->sequence > *last_sequence_)
                dropped_ += buffer->sequence - *last_sequence_ - 1;
            last_sequence_ = buffer->sequence;
            if ((buffer->flags & V4L2_BUF_FLAG_ERROR) != 0) {
                ++dropped_;
                give_back(buffer->index);
            } else if (!due(Clock::now())) {
                give_back(buffer->index);
            } else {
                publish({buffer->index, std::min<size_t>(buffer->bytesused, buffers_[buffer->index].length)});
            }
        }
    } catch (const CameraError& error) {
        record(error);
    }
}

void Camera::record(const CameraError& error) {
    const std::lock_guard guard(lock_);
    if (error_.empty()) error_ = error.what();
    changed_.notify_one();
}

std::optional<v4l2_buffer> Camera::next_frame() {
    pollfd waiting{file_, POLLIN, 0};
    if (poll(&waiting, 1, POLL_MS) < 0 && errno != EINTR) fail_by("waited for", errno);
    if (waiting.revents == 0) return std::nullopt;
    v4l2_buffer buffer = empty_buffer();
    if (control(file_, VIDIOC_DQBUF, &buffer) == 0)
        return buffer;  // also where poll reports an error: frames may be left
    if (errno == EAGAIN && (waiting.revents & (POLLERR | POLLHUP)) == 0) return std::nullopt;
    fail_by("read", errno == EAGAIN ? EIO : errno);
}

// Due times advance by exactly 1 / rate, so that the average has no drift; after a gap they start anew.
bool Camera::due(Clock::time_point now) {
    if (options_.rate <= 0) return true;
    const auto period = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(1 / options_.rate));
    if (!next_due_ || now > *next_due_ + period) next_due_ = now;
    if (now < *next_due_) return false;
    *next_due_ += period;
    return true;
}

void Camera::publish(const Frame& frame) {
    std::optional<Frame> replaced = frame;
    {
        const std::lock_guard guard(lock_);
        std::swap(newest_, replaced);
    }
    changed_.notify_one();
    if (replaced) {
        ++dropped_;
        give_back(replaced->buffer);
    }
}

void Camera::give_back(uint32_t index) {
    v4l2_buffer buffer = empty_buffer();
    buffer.index = index;
    if (control(file_, VIDIOC_QBUF, &buffer) < 0) fail_by("given its buffer back", errno);
}

void Camera::fail(const std::string& what) const { throw CameraError(options_.device + ": " + what); }

void Camera::fail_by(const char* doing, int error) const {
    switch (error) {
        case ENOENT: fail("there is no such camera; v4l2-ctl --list-devices names those that are there");
        case ENODEV:
        case ENXIO:
        case EIO: fail(std::string("the camera was unplugged or failed (") + std::strerror(error) + ")");
        case EACCES:
        case EPERM:
            fail("no permission; add yourself to the group video: sudo usermod -aG video $USER, then log in again");
        case EBUSY: fail("is in use by another program");
        case ENOSPC: fail("the USB bus has no bandwidth left; take --format mjpeg or a smaller size");
        default: fail(std::string("cannot be ") + doing + ": " + std::strerror(error));
    }
}
