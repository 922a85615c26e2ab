/* Steps a bundle and prints how many times the native library asked for memory in the steps after the first ones.
 *
 * malloc and its kin of this program take the place of everybody's; a call counts if it comes from the library's own
 * code, which has its C++ runtime inside. ONNX Runtime's do not count.
 *
 * allocations BUNDLE ONNXRUNTIME
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "framestep.h"

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static uintptr_t begin, end;
static volatile long count;

static void note(void *caller) {
    const uintptr_t from = (uintptr_t)caller;
    if (begin <= from && from < end) __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED);
}

void *malloc(size_t size) {
    note(__builtin_return_address(0));
    return __libc_malloc(size);
}
void *calloc(size_t number, size_t size) {
    note(__builtin_return_address(0));
    return __libc_calloc(number, size);
}
void *realloc(void *old, size_t size) {
    note(__builtin_return_address(0));
    return __libc_realloc(old, size);
}
void *aligned_alloc(size_t alignment, size_t size) {
    note(__builtin_return_address(0));
    return __libc_memalign(alignment, size);
}

static int find(struct dl_phdr_info *info, size_t size, void *unused) {
    (void)size, (void)unused;
    if (strstr(info->dlpi_name, "libframestep.so") == NULL) return 0;
    for (int index = 0; index < info->dlpi_phnum; ++index) {
        const uintptr_t stop = info->dlpi_addr + info->dlpi_phdr[index].p_vaddr + info->dlpi_phdr[index].p_memsz;
        if (info->dlpi_phdr[index].p_type == PT_LOAD && stop > end) end = stop;
    }
    begin = info->dlpi_addr;
    return 1;
}

static void check(fs_status status) {
    if (status == FS_OK) return;
    fprintf(stderr, "%s: %s\n", fs_status_name(status), fs_last_error());
    exit(1);
}

static void step(fs_session session, const fs_stream *streams, const uint8_t *pixels, int both) {
    fs_frame frames[2];
    memset(frames, 0, sizeof frames);
    for (int index = 0; index < 2; ++index) {
        frames[index].struct_size = sizeof *frames;
        frames[index].stream = streams[index];
        frames[index].data = pixels;
        frames[index].width = 640;
        frames[index].height = 360;
        frames[index].format = index == 0 ? FS_RGB : FS_BGR;
    }
    check(fs_step(session, frames, both ? 2 : 1));
    fs_tensor tensor;
    tensor.struct_size = sizeof tensor;
    check(fs_output(streams[0], 0, &tensor));
    if (!fs_output_valid(streams[0], tensor.generation)) exit(2);
}

int main(int arguments, char **values) {
    static uint8_t pixels[640 * 360 * 3];
    if (arguments != 3) return 2;
    dl_iterate_phdr(find, NULL);
    fs_session session;
    fs_stream streams[2];
    fs_session_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.streams = 2;
    options.library = values[2];
    check(fs_session_open(values[1], &options, &session));
    check(fs_stream_open(session, &streams[0]));
    check(fs_stream_open(session, &streams[1]));
    const long opening = count;
    for (int index = 0; index < 4; ++index) step(session, streams, pixels, index % 2);
    const long warm = count;
    for (int index = 0; index < 200; ++index) step(session, streams, pixels, index % 2);
    printf("%ld %ld\n", opening, count - warm);
    check(fs_session_close(session));
    return 0;
}
