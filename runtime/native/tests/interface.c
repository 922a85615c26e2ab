/* Every function of the interface, rightly and wrongly called, over the real ONNX Runtime. For the sanitizers and valgrind;
 * see sanitize.sh.
 *
 * framestep_interface BUNDLE ONNXRUNTIME FOLDER       the golden steps' bundle, and where states may be written
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "framestep.h"

#define CHECK(condition)                                                                                             \
    do {                                                                                                             \
        if (!(condition)) {                                                                                          \
            fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, #condition, fs_last_error()); \
            abort();                                                                                                 \
        }                                                                                                            \
    } while (0)

enum { WIDTH = 96, HEIGHT = 70, STEPS = 30 };

static uint8_t pixels[3 * WIDTH * HEIGHT];
static long messages;

static void receive(fs_log_level level, const char *message, void *user) {
    (void)level, (void)user;
    if (strstr(message, "in-place optimization not activated") != NULL) abort();
    __atomic_add_fetch(&messages, 1, __ATOMIC_RELAXED);
}

static fs_session_options options_for(const char *library) {
    static const char *const outputs[] = {"features", "pooled", "scores"};
    fs_session_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.library = library;
    options.device = "cpu";
    options.precision = "fp32";
    options.outputs = outputs;
    options.output_count = 3;
    options.streams = 2;
    options.threads = 1;
    return options;
}

/* In heap memory of its very size, so that a sanitizer sees what lies beyond. */
static fs_frame *new_frame(fs_stream stream) {
    fs_frame *frame = calloc(1, sizeof *frame);
    CHECK(frame != NULL);
    frame->struct_size = sizeof *frame;
    frame->stream = stream;
    frame->data = pixels;
    frame->width = WIDTH;
    frame->height = HEIGHT;
    return frame;
}

static fs_status step(fs_session session, fs_stream stream) {
    fs_frame *frame = new_frame(stream);
    const fs_status status = fs_step(session, frame, 1);
    free(frame);
    return status;
}

static float first_number(fs_stream stream, size_t index) {
    fs_tensor tensor;
    tensor.struct_size = sizeof tensor;
    CHECK(fs_output(stream, index, &tensor) == FS_OK);
    CHECK(fs_output_valid(stream, tensor.generation) == 1);
    return *(const float *)tensor.data;
}

static void describe_everything(fs_session session) {
    fs_session_info info = {.struct_size = sizeof info};
    fs_graph_info graph = {.struct_size = sizeof graph};
    fs_port_info port = {.struct_size = sizeof port};
    fs_state_info state = {.struct_size = sizeof state};
    fs_output_info output = {.struct_size = sizeof output};
    const char *name;
    CHECK(fs_session_describe(session, &info) == FS_OK);
    CHECK(info.outputs == 3 && info.labels == 3 && info.states == 6 && strcmp(info.precision, "fp32") == 0);
    for (size_t index = 0; index <= info.graphs; ++index) {
        CHECK(fs_graph_describe(session, index, &graph) == (index < info.graphs ? FS_OK : FS_ERROR_ARGUMENT));
        for (size_t one = 0; index < info.graphs && one <= graph.inputs; ++one) {
            CHECK(fs_graph_input_describe(session, index, one, &port) == (one < graph.inputs ? FS_OK : FS_ERROR_ARGUMENT));
        }
        for (size_t one = 0; index < info.graphs && one <= graph.outputs; ++one) {
            CHECK(fs_graph_output_describe(session, index, one, &port) == (one < graph.outputs ? FS_OK : FS_ERROR_ARGUMENT));
        }
    }
    for (size_t index = 0; index <= info.states; ++index) {
        CHECK(fs_state_describe(session, index, &state) == (index < info.states ? FS_OK : FS_ERROR_ARGUMENT));
    }
    for (size_t index = 0; index <= info.outputs; ++index) {
        CHECK(fs_output_describe(session, index, &output) == (index < info.outputs ? FS_OK : FS_ERROR_ARGUMENT));
    }
    for (size_t index = 0; index <= info.labels; ++index) {
        CHECK(fs_label_name(session, index, &name) == (index < info.labels ? FS_OK : FS_ERROR_ARGUMENT));
    }
}

static void states_come_back(fs_session session, fs_stream stream, const char *folder) {
    fs_state_info info = {.struct_size = sizeof info};
    char path[512];
    int64_t position;
    CHECK(snprintf(path, sizeof path, "%s/interface.state", folder) < (int)sizeof path);
    CHECK(fs_state_describe(session, 2, &info) == FS_OK);
    uint8_t *memory = malloc(info.bytes);
    CHECK(memory != NULL);
    CHECK(fs_state_save(stream, path) == FS_OK);
    CHECK(fs_position(stream, &position) == FS_OK);
    CHECK(fs_state_read(stream, 2, memory, info.bytes) == FS_OK);
    CHECK(step(session, stream) == FS_OK);
    const float expected = first_number(stream, 1);
    CHECK(fs_state_write(stream, 2, memory, info.bytes) == FS_OK);
    CHECK(fs_seek(stream, position) == FS_OK);
    CHECK(step(session, stream) == FS_OK);
    CHECK(first_number(stream, 1) == expected);
    CHECK(fs_state_load(stream, path) == FS_OK);
    CHECK(step(session, stream) == FS_OK);
    CHECK(first_number(stream, 1) == expected);
    memset(memory, 0xff, info.bytes); /* NaN */
    CHECK(fs_state_write(stream, 2, memory, info.bytes) == FS_OK);
    CHECK(step(session, stream) == FS_ERROR_NONFINITE);
    CHECK(fs_position(stream, &position) == FS_OK && position == 0);
    CHECK(fs_state_read(stream, 2, memory, info.bytes - 1) == FS_ERROR_ARGUMENT);
    CHECK(fs_state_read(stream, 99, memory, info.bytes) == FS_ERROR_ARGUMENT);
    CHECK(fs_state_load(stream, folder) == FS_ERROR_STATE);
    CHECK(fs_state_save(stream, "/nowhere/state") == FS_ERROR_OUTPUT);
    CHECK(fs_seek(stream, -1) == FS_ERROR_ARGUMENT);
    free(memory);
    remove(path);
}

static void bad_frames_are_refused(fs_session session, fs_stream stream) {
    fs_frame *frame = new_frame(stream);
    frame->stride = 1;
    CHECK(fs_step(session, frame, 1) == FS_ERROR_FRAME);
    frame->stride = 0;
    frame->width = 1 << 20;
    CHECK(fs_step(session, frame, 1) == FS_ERROR_FRAME);
    frame->width = WIDTH;
    frame->format = (fs_format)9;
    CHECK(fs_step(session, frame, 1) == FS_ERROR_FRAME);
    frame->format = FS_RGB;
    frame->stream = stream + ((fs_stream)1 << 32);
    CHECK(fs_step(session, frame, 1) == FS_ERROR_HANDLE);
    frame->stream = stream;
    frame->struct_size = 8;
    CHECK(fs_step(session, frame, 1) == FS_ERROR_ARGUMENT);
    CHECK(fs_step(session, NULL, 1) == FS_ERROR_ARGUMENT);
    CHECK(fs_step(session, frame, 3) == FS_ERROR_ARGUMENT);
    CHECK(fs_step(0, frame, 1) == FS_ERROR_HANDLE);
    CHECK(fs_step(session, NULL, 0) == FS_OK);
    free(frame);
}

static void frames_of_all_formats(fs_session session, fs_stream stream) {
    for (int format = FS_RGB; format <= FS_GREY; ++format) {
        const int channels = format == FS_GREY ? 1 : 3, padding = 5 * format;
        for (int side = 1; side < 130; side += 43) {
            const int stride = side * channels + padding;
            uint8_t *image = malloc((size_t)stride * (side - 1) + side * channels); /* the last row has no padding */
            fs_frame *frame = new_frame(stream);
            CHECK(image != NULL);
            memset(image, side, (size_t)stride * (side - 1) + side * channels);
            frame->data = image;
            frame->width = frame->height = side;
            frame->stride = stride;
            frame->format = (fs_format)format;
            CHECK(fs_step(session, frame, 1) == FS_OK);
            free(image);
            free(frame);
        }
    }
}

static void labels_change(fs_session session, fs_stream stream) {
    static const char *const names[] = {"one", "two"};
    fs_labels labels = {.struct_size = sizeof labels, .count = 2, .names = names, .text_hidden = 96, .patch_text_hidden = 96};
    float *embeddings = calloc(2 * 96, sizeof *embeddings);
    const char *name;
    CHECK(embeddings != NULL);
    labels.text_embeddings = labels.patch_text_embeddings = embeddings;
    CHECK(fs_set_labels(session, &labels) == FS_OK);
    free(embeddings); /* it has copied them */
    CHECK(fs_label_name(session, 1, &name) == FS_OK && strcmp(name, "two") == 0);
    CHECK(step(session, stream) == FS_OK);
    (void)first_number(stream, 2);
    labels.count = 0;
    CHECK(fs_set_labels(session, &labels) == FS_ERROR_ARGUMENT);
}

typedef struct {
    fs_session session;
    fs_stream stream;
} place;

static void *drive(void *given) {
    const place *mine = given;
    for (int frame = 0; frame < STEPS; ++frame) {
        CHECK(step(mine->session, mine->stream) == FS_OK);
        (void)first_number(mine->stream, 1);
    }
    return NULL;
}

int main(int count, char **arguments) {
    fs_session session;
    fs_stream streams[2], third;
    fs_stats stats = {.struct_size = sizeof stats};
    int32_t available = 0;
    if (count != 4) return 2;
    for (size_t at = 0; at < sizeof pixels; ++at) pixels[at] = (uint8_t)(at * 7);
    fs_log_to(receive, NULL);
    CHECK(fs_api_version() == FS_API_VERSION && fs_version()[0] != '\0' && fs_last_error()[0] == '\0');
    CHECK(strcmp(fs_status_name(FS_ERROR_BUSY), "FS_ERROR_BUSY") == 0);
    CHECK(fs_device_available(arguments[2], "cpu", &available) == FS_OK && available == 1);
    CHECK(fs_device_available(arguments[2], "tpu", &available) == FS_ERROR_ARGUMENT);
    CHECK(fs_device_available("/nowhere.so", "cpu", &available) == FS_ERROR_ENGINE);

    fs_session_options options = options_for(arguments[2]);
    CHECK(fs_session_open("/nowhere", &options, &session) == FS_ERROR_BUNDLE && session == 0);
    options.precision = "fp8";
    CHECK(fs_session_open(arguments[1], &options, &session) == FS_ERROR_BUNDLE);
    options = options_for("/nowhere.so");
    CHECK(fs_session_open(arguments[1], &options, &session) == FS_ERROR_ENGINE);
    options = options_for(arguments[2]);
    options.manifest = "{\"format\": \"framestep\", \"version\": 1}";
    CHECK(fs_session_open(arguments[1], &options, &session) == FS_ERROR_BUNDLE);

    static const char *const engines[] = {"auto", "auto", "onnxruntime:bf16"}, *const precisions[] = {"fp32", "auto", "fp32"};
    for (int round = 0; round < 3; ++round) { /* once more, after everything was given back */
        options = options_for(arguments[2]);
        options.engine = engines[round];
        options.precision = precisions[round];
        const fs_status opened = fs_session_open(arguments[1], &options, &session);
        if (round == 2 && opened == FS_ERROR_ENGINE && strstr(fs_last_error(), "AVX512-BF16") != NULL) break;
        CHECK(opened == FS_OK);
        if (round == 0) describe_everything(session);
        CHECK(fs_stream_open(session, &streams[0]) == FS_OK && fs_stream_open(session, &streams[1]) == FS_OK);
        CHECK(fs_stream_open(session, &third) == FS_ERROR_ENGINE && third == 0);
        CHECK(fs_warm_up(session, 1) == FS_OK);
        pthread_t threads[2];
        place places[] = {{session, streams[0]}, {session, streams[1]}};
        for (int index = 0; index < 2; ++index) CHECK(pthread_create(&threads[index], NULL, drive, &places[index]) == 0);
        for (int index = 0; index < 2; ++index) CHECK(pthread_join(threads[index], NULL) == 0);
        CHECK(first_number(streams[0], 1) == first_number(streams[1], 1));
        if (round != 1) states_come_back(session, streams[0], arguments[3]); /* a quantizer makes a number of NaN */
        bad_frames_are_refused(session, streams[0]);
        frames_of_all_formats(session, streams[1]);
        labels_change(session, streams[0]);
        CHECK(fs_drop(streams[0], 3) == FS_OK && fs_stats_read(streams[0], &stats) == FS_OK && stats.dropped == 3);
        CHECK(fs_reset(streams[0]) == FS_OK && fs_stream_close(streams[0]) == FS_OK);
        CHECK(fs_reset(streams[0]) == FS_ERROR_HANDLE && fs_session_close(streams[1]) == FS_ERROR_HANDLE);
        CHECK(fs_session_close(session) == FS_OK && fs_session_close(session) == FS_ERROR_HANDLE);
    }
    fs_log_to(NULL, NULL);
    puts("ok");
    return 0;
}
