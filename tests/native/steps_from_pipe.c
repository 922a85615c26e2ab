/* Steps three streams of a bundle on what standard input says, alone and together, and writes what they gave.
 *
 *     steps_from_pipe BUNDLE ENGINE PRECISION SIDE < steps > outputs
 *
 * A step is a byte whose bits say which streams advance, then for each of those a frame of SIDE x SIDE RGB pixels. For each
 * stream that advanced come its position as int64, then its features, pooled, scores and patch_scores as float32.
 */
#include <framestep.h>
#include <stdio.h>
#include <stdlib.h>

enum { STREAMS = 3, OUTPUTS = 4 };

static void check(fs_status status) {
    if (status == FS_OK) return;
    fprintf(stderr, "%s\n", fs_last_error());
    exit(1);
}

static void need(int good, const char *what) {
    if (good) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

int main(int count, char **arguments) {
    const char *const outputs[OUTPUTS] = {"features", "pooled", "scores", "patch_scores"};
    fs_session_options options = {0};
    fs_session session;
    fs_stream streams[STREAMS];
    need(count == 5, "expected BUNDLE ENGINE PRECISION SIDE");
    const int32_t side = (int32_t)atoi(arguments[4]);
    const size_t bytes = (size_t)side * (size_t)side * 3;
    uint8_t *pixels = malloc(STREAMS * bytes);
    need(pixels != NULL, "no memory");

    options.struct_size = sizeof options;
    options.engine = arguments[2];
    options.precision = arguments[3];
    options.streams = STREAMS;
    options.outputs = outputs;
    options.output_count = OUTPUTS;
    check(fs_session_open(arguments[1], &options, &session));
    for (int stream = 0; stream < STREAMS; ++stream) check(fs_stream_open(session, &streams[stream]));

    for (int mask = getchar(); mask != EOF; mask = getchar()) {
        fs_frame frames[STREAMS] = {{0}};
        size_t advancing = 0;
        for (int stream = 0; stream < STREAMS; ++stream) {
            if (!(mask >> stream & 1)) continue;
            fs_frame *frame = &frames[advancing];
            frame->struct_size = sizeof *frame;
            frame->stream = streams[stream];
            frame->data = pixels + advancing * bytes;
            frame->width = frame->height = side;
            frame->format = FS_RGB;
            ++advancing;
        }
        need(fread(pixels, bytes, advancing, stdin) == advancing, "standard input ended within a step");
        check(fs_step(session, frames, advancing));
        for (size_t index = 0; index < advancing; ++index) {
            fwrite(&frames[index].position, sizeof frames[index].position, 1, stdout);
            for (size_t output = 0; output < OUTPUTS; ++output) {
                fs_tensor tensor = {0};
                tensor.struct_size = sizeof tensor;
                check(fs_output(frames[index].stream, output, &tensor));
                need(fwrite(tensor.data, 1, tensor.bytes, stdout) == tensor.bytes, "standard output cannot be written");
            }
        }
    }
    free(pixels);
    check(fs_session_close(session));
    return fflush(stdout) == 0 ? 0 : 1;
}
