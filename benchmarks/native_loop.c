/* The step loop of a C program, on a thread of its own, for native_step.py: nothing of Python runs in it. */
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "framestep.h"

typedef struct {
    fs_session session;
    fs_frame frame;
    double *milliseconds; /* [steps] */
    double *outside;      /* [steps]: of these, beyond the engine's own run; null: not looked at, which costs time itself */
    long steps;
    fs_status status;
} loop;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec * 1e-6;
}

static void *drive(void *given) {
    loop *work = given;
    for (long step = 0; step < work->steps && work->status == FS_OK; ++step) {
        const double start = now();
        work->status = fs_step(work->session, &work->frame, 1);
        work->milliseconds[step] = now() - start;
        fs_stats stats;
        memset(&stats, 0, sizeof stats);
        stats.struct_size = sizeof stats;
        if (work->outside != NULL && fs_stats_read(work->frame.stream, &stats) == FS_OK) {
            work->outside[step] = work->milliseconds[step] - stats.last_engine_ms;
        }
    }
    return NULL;
}

int run_loop(fs_session session, fs_stream stream, const uint8_t *rgb, int width, int height, long steps,
             double *milliseconds, double *outside) {
    loop work;
    pthread_t thread;
    memset(&work, 0, sizeof work);
    work.session = session;
    work.frame.struct_size = sizeof work.frame;
    work.frame.stream = stream;
    work.frame.data = rgb;
    work.frame.width = width;
    work.frame.height = height;
    work.steps = steps;
    work.milliseconds = milliseconds;
    work.outside = outside;
    if (pthread_create(&thread, NULL, drive, &work) != 0) return FS_ERROR_MEMORY;
    pthread_join(thread, NULL);
    return work.status;
}
