/* A V4L2 camera for a program that has none: preloaded, it answers open, ioctl, mmap, munmap, poll and close for one
 * device, as the kernel does for a USB camera. It fills buffers at its own pace, loses frames where it has no buffer, and
 * says "stand-in: ..." on standard error about a call that a driver would refuse or that leaves something behind.
 *
 * Environment:
 *   STAND_IN_DEVICE    the device's path, also of one that does not exist
 *   STAND_IN_FORMATS   formats that it offers, such as "YUYV,MJPG"
 *   STAND_IN_FRAME     file with the bytes of a frame, and STAND_IN_SIZE, such as "64x48", its size in pixels
 *   STAND_IN_FRAMES    how many it sends before it is unplugged; 0: no end, -1: none at all, and it stays
 *   STAND_IN_PERIOD_US between two frames
 *   STAND_IN_FAULT     "" or
 *                      busy, output, read (not able to do what is needed), other-format, few-buffers, no-bandwidth,
 *                      gap (three frames lost after the fifth), damaged (every other one is flagged),
 *                      short (every other one has half of its bytes)
 *   STAND_IN_LOG       file that gets the names of the calls, one a line, frames left out
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

enum { MOST = 8, PAGE = 4096 };
enum state { with_program, queued, filled };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int device = -1;
static int streaming, unplugged;
static uint32_t pixel_format;
static unsigned width, height;
static char *frame;
static size_t frame_bytes, buffer_bytes;
static long sent, limit, period_us, sequence;
static int64_t next_us;
static FILE *log_file;

static struct {
    enum state state;
    long order; /* in which it was queued, or filled */
    void *memory;
    int mapped;
    struct v4l2_buffer last;
} buffers[MOST];
static unsigned buffer_count;
static long order;

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value == NULL ? "" : value;
}

static int fault(const char *name) { return strcmp(setting("STAND_IN_FAULT"), name) == 0; }

static void note(const char *call) {
    if (log_file != NULL) fprintf(log_file, "%s\n", call);
}

static void complain(const char *what) { fprintf(stderr, "stand-in: %s\n", what); }

static int64_t now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static int refuse(int error) {
    errno = error;
    return -1;
}

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static void read_settings(void) {
    sscanf(setting("STAND_IN_SIZE"), "%ux%u", &width, &height);
    limit = atol(setting("STAND_IN_FRAMES"));
    period_us = atol(setting("STAND_IN_PERIOD_US"));
    FILE *file = fopen(setting("STAND_IN_FRAME"), "rb");
    if (file != NULL) {
        fseek(file, 0, SEEK_END);
        frame_bytes = (size_t)ftell(file);
        rewind(file);
        frame = malloc(frame_bytes);
        if (fread(frame, 1, frame_bytes, file) != frame_bytes) complain("the frame cannot be read");
        fclose(file);
    }
    buffer_bytes = (2 * (size_t)width * height + frame_bytes + PAGE) / PAGE * PAGE;
    log_file = *setting("STAND_IN_LOG") ? fopen(setting("STAND_IN_LOG"), "w") : NULL;
}

static int open_device(const char *path, int flags) {
    if (device >= 0) complain("opened twice");
    if ((flags & O_ACCMODE) != O_RDWR || !(flags & O_NONBLOCK)) complain("not opened for reading, writing and polling");
    read_settings();
    int (*real_open)(const char *, int, ...) = (int (*)(const char *, int, ...))real("open");
    (void)path;
    note("open");
    return device = real_open("/dev/null", flags);
}

static int first(enum state state) {
    int found = -1;
    for (unsigned index = 0; index < buffer_count; ++index) {
        if (buffers[index].state == state && (found < 0 || buffers[index].order < buffers[found].order))
            found = (int)index;
    }
    return found;
}

/* What the camera sent until now. */
static void produce(void) {
    while (streaming && !unplugged && limit >= 0 && now_us() >= next_us) {
        const int index = first(queued);
        const int last = limit > 0 && sent == limit - 1;
        if (last && index < 0)
            return; /* the last one waits, so that each frame is seen or leaves a gap before another */
        if (fault("gap") && sent == 5) sequence += 3;
        if (index >= 0) {
            struct v4l2_buffer *buffer = &buffers[index].last;
            memset(buffer, 0, sizeof *buffer);
            memcpy(buffers[index].memory, frame, frame_bytes);
            buffer->bytesused = (uint32_t)frame_bytes;
            if (fault("short") && sent % 2 == 1) buffer->bytesused /= 2;
            if (fault("damaged") && sent % 2 == 1) buffer->flags = V4L2_BUF_FLAG_ERROR;
            buffer->sequence = (uint32_t)sequence;
            buffers[index].state = filled;
            buffers[index].order = order++;
        }
        ++sequence;
        next_us += period_us;
        if (++sent == limit) unplugged = 1;
    }
}

static int enumerate(struct v4l2_fmtdesc *entry) {
    const char *offered = setting("STAND_IN_FORMATS");
    const size_t at = 5 * (size_t)entry->index; /* four letters and a comma each */
    if (strlen(offered) < at + 4) return refuse(EINVAL);
    memcpy(&entry->pixelformat, offered + at, 4);
    return 0;
}

static int set_format(struct v4l2_format *format) {
    struct v4l2_pix_format *pixels = &format->fmt.pix;
    if (fault("busy")) return refuse(EBUSY);
    if (format->type != V4L2_BUF_TYPE_VIDEO_CAPTURE) return refuse(EINVAL);
    pixels->width = width;
    pixels->height = height;
    if (fault("other-format")) pixels->pixelformat = v4l2_fourcc('N', 'V', '1', '2');
    pixel_format = pixels->pixelformat;
    pixels->bytesperline = pixel_format == V4L2_PIX_FMT_YUYV ? (uint32_t)(frame_bytes / height) : 0;
    pixels->sizeimage = (uint32_t)buffer_bytes;
    return 0;
}

static int request(struct v4l2_requestbuffers *asked) {
    if (asked->memory != V4L2_MEMORY_MMAP || pixel_format == 0) return refuse(EINVAL);
    if (asked->count > MOST) asked->count = MOST;
    if (fault("few-buffers")) asked->count = 2;
    buffer_count = asked->count;
    return 0;
}

static int query(struct v4l2_buffer *buffer) {
    if (buffer->index >= buffer_count) return refuse(EINVAL);
    buffer->length = (uint32_t)buffer_bytes;
    buffer->m.offset = (uint32_t)(buffer_bytes * buffer->index);
    return 0;
}

static int queue(struct v4l2_buffer *buffer) {
    if (unplugged && first(filled) < 0) return refuse(ENODEV);
    if (buffer->index >= buffer_count || buffers[buffer->index].state != with_program) {
        complain("a buffer was queued that is not the program's");
        return refuse(EINVAL);
    }
    if (!buffers[buffer->index].mapped) complain("a buffer was queued that is not mapped");
    buffers[buffer->index].state = queued;
    buffers[buffer->index].order = order++;
    return 0;
}

static int dequeue(struct v4l2_buffer *buffer) {
    produce();
    const int index = first(filled);
    if (index < 0) return refuse(unplugged ? ENODEV : EAGAIN);
    *buffer = buffers[index].last;
    buffer->index = (uint32_t)index;
    buffer->length = (uint32_t)buffer_bytes;
    buffers[index].state = with_program;
    return 0;
}

static int start(void) {
    if (fault("no-bandwidth")) return refuse(ENOSPC);
    if (first(queued) < 0) complain("started without a buffer");
    streaming = 1;
    next_us = now_us() + period_us;
    return 0;
}

static int stop(void) {
    streaming = 0;
    for (unsigned index = 0; index < buffer_count; ++index) buffers[index].state = with_program;
    return 0;
}

static int answer(unsigned long number, void *argument) {
    struct v4l2_capability *capability = argument;
    switch (number) {
        case VIDIOC_QUERYCAP:
            note("QUERYCAP");
            capability->capabilities = V4L2_CAP_DEVICE_CAPS | V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
            capability->device_caps = fault("output") ? V4L2_CAP_VIDEO_OUTPUT | V4L2_CAP_STREAMING
                                      : fault("read") ? V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_READWRITE
                                                      : V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
            return 0;
        case VIDIOC_ENUM_FMT: return enumerate(argument);
        case VIDIOC_S_FMT: note("S_FMT"); return set_format(argument);
        case VIDIOC_REQBUFS: note("REQBUFS"); return request(argument);
        case VIDIOC_QUERYBUF: note("QUERYBUF"); return query(argument);
        case VIDIOC_QBUF: return queue(argument);
        case VIDIOC_DQBUF: return dequeue(argument);
        case VIDIOC_STREAMON: note("STREAMON"); return start();
        case VIDIOC_STREAMOFF: note("STREAMOFF"); return stop();
        default: return refuse(ENOTTY);
    }
}

static int is_device(const char *path) { return strcmp(path, setting("STAND_IN_DEVICE")) == 0; }

static mode_t mode_of(int flags, va_list arguments) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

int open(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = mode_of(flags, arguments);
    va_end(arguments);
    if (is_device(path)) return open_device(path, flags);
    return ((int (*)(const char *, int, ...))real("open"))(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = mode_of(flags, arguments);
    va_end(arguments);
    if (is_device(path)) return open_device(path, flags);
    return ((int (*)(const char *, int, ...))real("open64"))(path, flags, mode);
}

int ioctl(int file, unsigned long number, ...) {
    va_list arguments;
    va_start(arguments, number);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (file != device || file < 0) return ((int (*)(int, unsigned long, ...))real("ioctl"))(file, number, argument);
    pthread_mutex_lock(&lock);
    const int result = answer(number, argument);
    pthread_mutex_unlock(&lock);
    return result;
}

static void *map(const char *name, void *wish, size_t length, int protection, int flags, int file, off_t offset) {
    void *(*real_mmap)(void *, size_t, int, int, int, off_t) =
        (void *(*)(void *, size_t, int, int, int, off_t))real(name);
    if (file != device || file < 0) return real_mmap(wish, length, protection, flags, file, offset);
    const size_t index = (size_t)offset / buffer_bytes;
    if (length != buffer_bytes || index >= buffer_count || !(flags & MAP_SHARED)) return errno = EINVAL, MAP_FAILED;
    void *memory = real_mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    note("mmap");
    buffers[index].memory = memory;
    buffers[index].mapped = 1;
    return memory;
}

void *mmap(void *wish, size_t length, int protection, int flags, int file, off_t offset) {
    return map("mmap", wish, length, protection, flags, file, offset);
}

void *mmap64(void *wish, size_t length, int protection, int flags, int file, off_t offset) {
    return map("mmap64", wish, length, protection, flags, file, offset);
}

int munmap(void *memory, size_t length) {
    for (unsigned index = 0; index < buffer_count; ++index) {
        if (buffers[index].mapped && buffers[index].memory == memory) {
            if (streaming) complain("a buffer was unmapped that the camera may still fill");
            buffers[index].mapped = 0;
            note("munmap");
        }
    }
    return ((int (*)(void *, size_t))real("munmap"))(memory, length);
}

int poll(struct pollfd *files, nfds_t count, int timeout) {
    if (device < 0 || count != 1 || files->fd != device) {
        return ((int (*)(struct pollfd *, nfds_t, int))real("poll"))(files, count, timeout);
    }
    const int64_t until = now_us() + 1000 * (int64_t)timeout;
    for (;;) {
        pthread_mutex_lock(&lock);
        produce();
        files->revents = first(filled) >= 0 ? POLLIN : unplugged ? POLLERR | POLLHUP : 0;
        const int64_t next = next_us;
        pthread_mutex_unlock(&lock);
        const int64_t now = now_us();
        if (files->revents != 0) return 1;
        if (now >= until) return 0;
        int64_t wait = (next > now && next < until ? next : until) - now;
        if (next <= now && limit >= 0) wait = 200; /* for a buffer */
        nanosleep(&(struct timespec){wait / 1000000, wait % 1000000 * 1000}, NULL);
    }
}

int close(int file) {
    if (file == device && file >= 0) {
        if (streaming) complain("closed while streaming");
        for (unsigned index = 0; index < buffer_count; ++index) {
            if (buffers[index].mapped) complain("closed with a buffer mapped");
        }
        note("close");
        if (log_file != NULL) fclose(log_file);
        log_file = NULL;
        free(frame);
        device = -1;
    }
    return ((int (*)(int))real("close"))(file);
}
