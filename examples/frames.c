/* Steps a bundle on raw frames from standard input and prints one JSON line a frame.
 *
 *     ffmpeg -v error -i clip.mp4 -vf fps=8,scale=640:360 -f rawvideo -pix_fmt rgb24 - |
 *         frames --width 640 --height 360 streamformer.bundle
 *
 *     {"position":0,"latency_ms":8.213,"scores":{"a red car":0.0213,"opening a door":0.871}}
 *
 * A bundle without labels gives the shape and the norm of each output in the place of scores, and says so on standard
 * error, where errors are one line too. Exit status: 0 after the last frame, 1 when something failed, 2 for wrong options.
 */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#include <framestep.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_SIDE = 16384, MAX_OUTPUTS = 16, FAILED = 1, WRONG_OPTIONS = 2 };

static const char USAGE[] =
    "usage: frames --width PIXELS --height PIXELS [options] BUNDLE\n"
    "Reads raw frames of uint8 from standard input, prints one JSON line a frame.\n"
    "  --format     rgb (if not given), bgr or grey\n"
    "  --precision  which of the bundle's to run; the fastest if not given\n"
    "  --output     an output to print in full, row after row; several may be named\n"
    "FRAMESTEP_ONNXRUNTIME in the environment is the path of ONNX Runtime's shared library.\n";

struct options {
    const char *bundle;
    const char *precision;
    const char *outputs[MAX_OUTPUTS]; /* to be printed in full */
    size_t output_count;
    int32_t width, height;
    fs_format format;
};

struct model {
    fs_session session;
    fs_stream stream;
    fs_session_info info;
    int in_full;
};

static void complain(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("frames: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

/* Whether a call succeeded; says what was wrong if not. */
static int done(fs_status status) {
    if (status != FS_OK) complain("%s", fs_last_error());
    return status == FS_OK;
}

/* Pixels of one side; 0: not possible. */
static int32_t side_of(const char *text) {
    char *end;
    const long side = strtol(text, &end, 10);
    return *end == '\0' && side >= 1 && side <= MAX_SIDE ? (int32_t)side : 0;
}

/* Takes one option and its value; says what is wrong with them and returns 0 if they are none. */
static int take_option(struct options *options, const char *name, const char *value) {
    static const char *const formats[] = {"rgb", "bgr", "grey"}; /* as fs_format counts */
    if (value == NULL) {
        complain("%s needs a value", name);
        return 0;
    }
    if (strcmp(name, "--width") == 0 || strcmp(name, "--height") == 0) {
        int32_t *side = name[2] == 'w' ? &options->width : &options->height;
        *side = side_of(value);
        if (*side == 0) complain("%s is '%s': expected 1 to %d pixels", name, value, MAX_SIDE);
        return *side != 0;
    }
    if (strcmp(name, "--format") == 0) {
        for (int format = FS_RGB; format <= FS_GREY; ++format) {
            if (strcmp(value, formats[format]) == 0) {
                options->format = (fs_format)format;
                return 1;
            }
        }
        complain("--format is '%s': expected rgb, bgr or grey", value);
        return 0;
    }
    if (strcmp(name, "--precision") == 0) {
        options->precision = value;
        return 1;
    }
    if (strcmp(name, "--output") == 0) {
        if (options->output_count == MAX_OUTPUTS) {
            complain("--output: at most %d outputs", MAX_OUTPUTS);
            return 0;
        }
        options->outputs[options->output_count++] = value;
        return 1;
    }
    complain("%s is unknown; --help lists the options", name);
    return 0;
}

static int read_options(int count, char **arguments, struct options *options) {
    for (int index = 1; index < count; ++index) {
        if (strncmp(arguments[index], "--", 2) == 0) {
            if (!take_option(options, arguments[index], index + 1 < count ? arguments[index + 1] : NULL)) return 0;
            ++index;
        } else if (options->bundle != NULL) {
            complain("'%s': one bundle was named already", arguments[index]);
            return 0;
        } else {
            options->bundle = arguments[index];
        }
    }
    if (options->bundle == NULL || options->width == 0 || options->height == 0) {
        complain("expected --width, --height and a bundle; --help lists the options");
        return 0;
    }
    return 1;
}

static int outputs_are_float32(const struct model *model) {
    fs_output_info output = {0};
    output.struct_size = sizeof output;
    for (size_t index = 0; index < model->info.outputs; ++index) {
        if (!done(fs_output_describe(model->session, index, &output))) return 0;
        if (output.dtype != FS_FLOAT32) {
            complain("the output '%s' is not of float32, which is all that this program prints", output.name);
            return 0;
        }
    }
    return 1;
}

/* Opens the bundle and its one stream; after 0 nothing is open. */
static int open_model(const struct options *options, struct model *model) {
    fs_session_options session_options = {0};
    session_options.struct_size = sizeof session_options;
    session_options.precision = options->precision;
    session_options.outputs = options->outputs;
    session_options.output_count = options->output_count;
    if (!done(fs_session_open(options->bundle, &session_options, &model->session))) return 0;
    model->info.struct_size = sizeof model->info;
    model->in_full = options->output_count > 0;
    if (done(fs_session_describe(model->session, &model->info)) && outputs_are_float32(model) &&
        done(fs_warm_up(model->session, 2)) && done(fs_stream_open(model->session, &model->stream))) {
        if (model->info.labels == 0 && !model->in_full) {
            complain("%s has no labels ('framestep label' adds them): shapes and norms instead of scores", options->bundle);
        }
        return 1;
    }
    fs_session_close(model->session);
    return 0;
}

/* A JSON string. The library's text is UTF-8, which JSON takes as it is. */
static void print_text(const char *text) {
    putchar('"');
    for (; *text != '\0'; ++text) {
        const unsigned char byte = (unsigned char)*text;
        if (byte < 0x20) {
            printf("\\u%04x", byte);
        } else {
            if (byte == '"' || byte == '\\') putchar('\\');
            putchar(byte);
        }
    }
    putchar('"');
}

static int print_scores(const struct model *model, const float *scores) {
    printf(",\"scores\":{");
    for (size_t label = 0; label < model->info.labels; ++label) {
        const char *name;
        if (!done(fs_label_name(model->session, label, &name))) return 0;
        if (label > 0) putchar(',');
        print_text(name);
        printf(":%.9g", scores[label]);
    }
    putchar('}');
    return 1;
}

static void print_numbers(const float *numbers, size_t count) {
    putchar('[');
    for (size_t index = 0; index < count; ++index) printf(index == 0 ? "%.9g" : ",%.9g", numbers[index]);
    putchar(']');
}

static void print_summary(const fs_tensor *tensor, const float *numbers, size_t count) {
    double squares = 0;
    for (size_t index = 0; index < count; ++index) squares += (double)numbers[index] * numbers[index];
    printf("{\"shape\":[");
    for (int32_t axis = 0; axis < tensor->rank; ++axis) {
        printf(axis == 0 ? "%lld" : ",%lld", (long long)tensor->shape[axis]);
    }
    printf("],\"norm\":%.9g}", sqrt(squares));
}

/* What the last step gave: scores by label where there are labels, otherwise (or if asked for) the outputs by name. */
static int print_outputs(const struct model *model) {
    for (size_t index = 0; index < model->info.outputs; ++index) {
        fs_output_info output = {0};
        fs_tensor tensor = {0};
        output.struct_size = sizeof output;
        tensor.struct_size = sizeof tensor;
        if (!done(fs_output_describe(model->session, index, &output))) return 0;
        if (!done(fs_output(model->stream, index, &tensor))) return 0;
        const float *numbers = tensor.data; /* borrowed until the next step */
        const size_t count = tensor.bytes / sizeof *numbers;
        if (strcmp(output.name, "scores") == 0) {
            if (!print_scores(model, numbers)) return 0;
        } else if (model->in_full || model->info.labels == 0) {
            putchar(',');
            print_text(output.name);
            putchar(':');
            if (model->in_full) {
                print_numbers(numbers, count);
            } else {
                print_summary(&tensor, numbers, count);
            }
        }
    }
    return 1;
}

static double milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

/* Steps one frame and prints its line. A model that gave NaN starts again, and so its line has no numbers. */
static int step(const struct model *model, fs_frame *frame) {
    const double start = milliseconds();
    const fs_status status = fs_step(model->session, frame, 1);
    const double end = milliseconds();
    if (status != FS_OK) complain("%s", fs_last_error());
    if (status != FS_OK && status != FS_ERROR_NONFINITE) return 0;
    printf("{\"position\":%lld,\"latency_ms\":%.3f", (long long)frame->position, end - start);
    if (status == FS_ERROR_NONFINITE) {
        printf(",\"nonfinite\":true");
    } else if (!print_outputs(model)) {
        return 0;
    }
    if (puts("}") == EOF || fflush(stdout) == EOF) {
        complain("standard output cannot be written");
        return 0;
    }
    return 1;
}

/* Steps every frame until standard input ends. */
static int step_all(const struct model *model, const struct options *options) {
    const size_t bytes = (size_t)options->width * (size_t)options->height * (options->format == FS_GREY ? 1 : 3);
    uint8_t *pixels = malloc(bytes);
    if (pixels == NULL) {
        complain("no memory for a frame of %zu bytes", bytes);
        return 0;
    }
    fs_frame frame = {0};
    frame.struct_size = sizeof frame;
    frame.stream = model->stream;
    frame.data = pixels;
    frame.width = options->width;
    frame.height = options->height;
    frame.format = options->format;
    unsigned long long frames = 0;
    size_t found;
    int good = 1;
    while (good && (found = fread(pixels, 1, bytes, stdin)) == bytes) { /* waits until a pipe has given them all */
        good = step(model, &frame);
        ++frames;
    }
    free(pixels);
    if (!good) return 0;
    if (ferror(stdin)) {
        complain("standard input cannot be read");
    } else if (found > 0) {
        complain("standard input ended within frame %llu, after %zu of %zu bytes; check --width, --height and --format",
                 frames, found, bytes);
    } else if (frames == 0) {
        complain("standard input ended before the first frame");
    } else {
        return 1;
    }
    return 0;
}

int main(int count, char **arguments) {
    for (int index = 1; index < count; ++index) {
        if (strcmp(arguments[index], "--help") == 0) return fputs(USAGE, stdout) == EOF ? FAILED : 0;
    }
    struct options options = {0};
    struct model model = {0};
    if (!read_options(count, arguments, &options)) return WRONG_OPTIONS;
    if (!open_model(&options, &model)) return FAILED;
    const int good = step_all(&model, &options);
    fs_session_close(model.session);
    return good ? 0 : FAILED;
}
