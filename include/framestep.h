/* framestep: streaming video models with their memory as explicit state, on live frames.
 *
 * A session is a model: graphs, weights and buffers, with room for some streams. A stream is one camera's place in it,
 * with its own clock. A program opens a session, opens a stream for each camera, steps a frame at a time and reads the
 * outputs where they lie.
 *
 * Handles are numbers, and 0 is never one. A handle that was closed, is of the other kind or was never given out is
 * answered with FS_ERROR_HANDLE. Closing a session closes its streams.
 *
 * Errors: every function that can fail returns an fs_status; fs_last_error() then has one line about it. Nothing is
 * thrown across this boundary, and a call that failed changed nothing unless its comment says otherwise.
 *
 * Threads: every function may be called from any thread. Steps of one session run one at a time; streams of one session
 * may be driven by different threads, which then wait for each other. One stream belongs to one thread at a time: a call
 * that finds another thread's call at work in the same stream returns FS_ERROR_BUSY and does nothing. fs_run is apart:
 * see there what waits for it and what goes on beside it.
 *
 * Memory: whatever is passed in stays the caller's, is not changed unless documented, and is not kept after the call.
 * What a function hands out is borrowed; its comment says for how long. Nothing that this library hands out is freed.
 *
 * Structs begin with `struct_size`, to be set to sizeof of the struct before the call. A library that knows more members
 * than its caller takes the missing ones as zero; one that knows fewer refuses what it does not know unless it is zero.
 * Set structs to zero first: zero is the default of every option. Text is UTF-8 and ends with a zero byte.
 *
 * Frames are uint8, rows top to bottom, three bytes or one a pixel, of any size from 1 to 16384 a side.
 */
#ifndef FRAMESTEP_H
#define FRAMESTEP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#ifdef __GNUC__
#pragma GCC visibility push(default)
#endif

/* framestep: declarations begin */

enum { FS_API_VERSION = 1, FS_MAX_RANK = 8 };

typedef enum fs_status {
    FS_OK = 0,
    FS_ERROR_ARGUMENT = 1,  /* a null pointer, a struct of a wrong size, a number out of range, an unknown name */
    FS_ERROR_HANDLE = 2,    /* not an open session or stream, or a stream of another session */
    FS_ERROR_BUSY = 3,      /* another thread's call is at work in this stream */
    FS_ERROR_BUNDLE = 4,    /* the bundle is missing, damaged, changed, or of a kind that this version cannot run */
    FS_ERROR_ENGINE = 5,    /* the engine or device cannot be used here, or failed */
    FS_ERROR_FRAME = 6,     /* a frame's size, stride or format is not possible */
    FS_ERROR_STATE = 7,     /* a saved state is missing, damaged, or of another model */
    FS_ERROR_OUTPUT = 8,    /* a file cannot be written */
    FS_ERROR_STALE = 9,     /* this stream has no outputs: it was not stepped yet, or a later step took their place */
    FS_ERROR_NONFINITE = 10, /* the model gave NaN or infinity; see fs_step */
    FS_ERROR_MEMORY = 11,   /* no memory */
    FS_ERROR_INTERNAL = 12  /* a bug in this library */
} fs_status;

typedef enum fs_dtype {
    FS_UINT8 = 1,
    FS_INT8 = 2,
    FS_INT32 = 3,
    FS_INT64 = 4,
    FS_BOOL = 5, /* a byte, 0 or not */
    FS_FLOAT16 = 6,
    FS_FLOAT32 = 7
} fs_dtype;

typedef enum fs_format {
    FS_RGB = 0, /* three bytes a pixel */
    FS_BGR = 1,
    FS_GREY = 2 /* one byte a pixel */
} fs_format;

typedef enum fs_log_level {
    FS_LOG_INFO = 1,
    FS_LOG_WARNING = 2,
    FS_LOG_ERROR = 3
} fs_log_level;

typedef uint64_t fs_session;
typedef uint64_t fs_stream;

/* How a session is to be opened. A member that is zero or null takes its default. */
typedef struct fs_session_options {
    size_t struct_size;
    const char *engine;    /* "auto" (default), "onnxruntime", "onnxruntime:bf16" (a CPU's products of float32 in bfloat16),
                              "onnxruntime:plain" (with no operator but its own: slower on a CPU, to compare with) or,
                              where it was built in, "tensorrt" */
    const char *device;    /* "auto" (default: the fastest there is), "cpu" or "cuda" */
    const char *precision; /* "auto" (default: the fastest in the bundle that the device runs well) or one of its own */
    const char *library;   /* path of ONNX Runtime's shared library, or of TensorRT's where that is the engine asked for.
                              Default: the environment's FRAMESTEP_ONNXRUNTIME, then the system's library path */
    const char *const *outputs; /* names of the outputs to bring to the host. Default: all that need no labels, and those
                                   of whole frames that need them where the bundle has labels */
    size_t output_count;
    int32_t streams;      /* places for streams; default 1 */
    int32_t threads;      /* of the engine; default: one for each core that this process may use, hyperthreads not
                             counted, within the quota of its control group (docker run --cpus) */
    int32_t trust_files;  /* 1: do not check that files are listed, of their size and unchanged, as the caller did */
    const char *manifest; /* the text to take in the place of the folder's manifest.json; default: read it */
    const char *const *graphs; /* names of graphs to load for fs_run, beside those of steps. Default: none */
    size_t graph_count;
} fs_session_options;

/* What a session is. Text is borrowed until the session is closed. */
typedef struct fs_session_info {
    size_t struct_size;
    const char *engine;    /* "onnxruntime", "onnxruntime:bf16", "onnxruntime:plain" or "tensorrt" */
    const char *device;    /* "cpu" or "cuda" */
    const char *precision; /* of the bundle's precisions */
    const char *library;   /* path of the engine's shared library */
    const char *library_version;
    const char *state_key; /* what a saved state must have been saved with */
    double rate;           /* frames a second that the model is to see; 0: every frame */
    int32_t height;        /* the model's input, pixels */
    int32_t width;
    int32_t streams; /* places */
    int32_t threads;
    size_t graphs;
    size_t states;
    size_t outputs;
    size_t labels;
    size_t state_bytes; /* memory of one stream */
    size_t step_graphs; /* so many of the graphs, the first ones, are what a step runs */
} fs_session_info;

/* A graph that the session has loaded: first those of a step, in the order in which they run, then those that
   fs_session_options asked for. */
typedef struct fs_graph_info {
    size_t struct_size;
    const char *name;
    const char *file;
    size_t inputs;
    size_t outputs;
    size_t states;
    size_t own_operators; /* parts of it that framestep's own operators run in the place of the engine's: rings, caches,
                             products with a constant matrix; 0 with "onnxruntime:plain" */
} fs_graph_info;

/* An input or an output of a graph. */
typedef struct fs_port_info {
    size_t struct_size;
    const char *name;
    const char *role; /* what feeds an input: docs/design.md has the list */
    fs_dtype dtype;
    int32_t rank;     /* without the streams axis */
    int64_t shape[8]; /* of one stream; -1 for an axis of any size, such as that of new tokens */
} fs_port_info;

/* A tensor that fs_run reads: of one stream, numbers of the input's type in C order, at an address that is a multiple of
   a number's size. */
typedef struct fs_input {
    size_t struct_size;
    const char *name;
    const void *data;
    fs_dtype dtype;
    int32_t rank;
    int64_t shape[8];
} fs_input;

/* A state: the memory that each stream carries from step to step. */
typedef struct fs_state_info {
    size_t struct_size;
    const char *name;
    fs_dtype dtype;
    int32_t rank; /* without the streams axis */
    int64_t shape[8];
    int32_t axis; /* of the slots, in `shape` */
    int64_t capacity;
    int64_t rows_per_slot;
    size_t bytes;      /* of one stream */
    uintptr_t address; /* of the first stream's memory; it never changes. Memory of the device: not for reading */
} fs_state_info;

/* An output. Its shape is that of one stream. */
typedef struct fs_output_info {
    size_t struct_size;
    const char *name;
    fs_dtype dtype;
    int32_t rank;
    int64_t shape[8];
    size_t bytes;
} fs_output_info;

/* Labels to score frames against, by their embeddings. */
typedef struct fs_labels {
    size_t struct_size;
    size_t count;
    const char *const *names; /* [count], or null: labels without names */
    const float *text_embeddings;       /* [count, text_hidden], row after row */
    const float *patch_text_embeddings; /* [count, patch_text_hidden] */
    size_t text_hidden;
    size_t patch_text_hidden;
    const float *logit_scale; /* of the sigmoid, a logarithm; null: the bundle's scoring */
    const float *logit_bias;
} fs_labels;

/* A frame for a stream, and what became of it. */
typedef struct fs_frame {
    size_t struct_size;
    fs_stream stream;
    const uint8_t *data; /* first row */
    int32_t width;       /* pixels */
    int32_t height;
    int64_t stride; /* bytes from one row to the next; 0: rows follow each other without a gap */
    fs_format format;
    /* written by fs_step: */
    fs_status status;   /* FS_OK, or FS_ERROR_NONFINITE */
    int64_t position;   /* index of the frame since the stream's reset */
    uint64_t nonfinite; /* bit i: output i had NaN or infinity; bit 63 also stands for all outputs after it */
} fs_frame;

/* A borrowed output. */
typedef struct fs_tensor {
    size_t struct_size;
    const void *data;
    fs_dtype dtype;
    int32_t rank;
    int64_t shape[8];
    size_t bytes;
    uint64_t generation; /* for fs_output_valid */
} fs_tensor;

/* Figures of a stream since it was opened. Milliseconds are those of its last 4096 steps: from the call of fs_step to its
   return. */
typedef struct fs_stats {
    size_t struct_size;
    uint64_t frames;    /* stepped */
    uint64_t dropped;   /* see fs_drop */
    uint64_t refused;   /* calls that returned FS_ERROR_BUSY */
    uint64_t nonfinite; /* steps that gave NaN or infinity */
    double p50_ms;
    double p95_ms;
    double p99_ms;
    double max_ms;
    double last_ms;
    double last_preprocess_ms; /* of the whole step: all of its frames */
    double last_engine_ms;     /* the engine's own run */
} fs_stats;

/* Receives a line without its end. May be called from any thread, several at once; must not call this library. */
typedef void (*fs_log_callback)(fs_log_level level, const char *message, void *user);

/* The library's version, such as "0.1.0". Borrowed for ever. */
const char *fs_version(void);

/* The FS_API_VERSION that the library was built with. A greater one has all of a smaller one's functions and members. */
int32_t fs_api_version(void);

/* One line about this thread's last call that failed; "" if none did. Borrowed until this thread's next call that fails. */
const char *fs_last_error(void);

/* The name of a status, such as "FS_ERROR_FRAME"; "unknown" for a number that is none. Borrowed for ever. */
const char *fs_status_name(fs_status status);

/* Where messages go: this library's and the engine's warnings. Null: to standard error, as at the start. `user` is handed
   to the callback. For the whole process; a callback replaced may still be running in another thread on return. */
void fs_log_to(fs_log_callback callback, void *user);

/* Whether sessions can be opened on a device ("cpu" or "cuda") with ONNX Runtime's library at `library` (null: where
   fs_session_options looks). Writes 1 or 0 to `available`.
   FS_ERROR_ENGINE: no library was found or it cannot be used; the message names the places looked at. */
fs_status fs_device_available(const char *library, const char *device, int32_t *available);

/* Opens the bundle in the folder `bundle`: reads and checks its manifest and files, loads its graphs, allocates all
   buffers, zeroed. `options` may be null. Writes the handle to `session`, 0 on failure.
   FS_ERROR_BUNDLE, FS_ERROR_ENGINE, FS_ERROR_ARGUMENT, FS_ERROR_MEMORY. Takes seconds for a large model. */
fs_status fs_session_open(const char *bundle, const fs_session_options *options, fs_session *session);

/* Waits for calls at work in it, closes its streams and frees everything. Borrowed memory of it is gone. */
fs_status fs_session_close(fs_session session);

fs_status fs_session_describe(fs_session session, fs_session_info *info);

/* `index` counts from 0 to fs_session_info's `graphs`, `states`, `outputs` or `labels`; FS_ERROR_ARGUMENT beyond. Names
   are borrowed until the session is closed, those of labels until fs_set_labels at the latest. The shape of an output that
   has a row for each label changes with fs_set_labels. */
fs_status fs_graph_describe(fs_session session, size_t index, fs_graph_info *info);
fs_status fs_graph_input_describe(fs_session session, size_t graph, size_t index, fs_port_info *info);
fs_status fs_graph_output_describe(fs_session session, size_t graph, size_t index, fs_port_info *info);
fs_status fs_state_describe(fs_session session, size_t index, fs_state_info *info);
fs_status fs_output_describe(fs_session session, size_t index, fs_output_info *info);
fs_status fs_label_name(fs_session session, size_t index, const char **name);

/* Scores frames against other labels from the next step on. Copies what it is given. The outputs of all streams are gone.
   FS_ERROR_BUNDLE: the bundle has no scoring and `labels` neither. FS_ERROR_ARGUMENT: no label, or embeddings of another
   width than the graphs take. */
fs_status fs_set_labels(fs_session session, const fs_labels *labels);

/* Runs every number of streams `steps` times, so that the first frames take no longer than the others. No clock moves;
   the outputs of all streams are gone. */
fs_status fs_warm_up(fs_session session, int32_t steps);

/* Takes a free place; its memory is that of a stream just reset. Writes the handle to `stream`, 0 on failure.
   FS_ERROR_ENGINE: every place is taken. */
fs_status fs_stream_open(fs_session session, fs_stream *stream);

/* Gives the place back. Its outputs are gone. */
fs_status fs_stream_close(fs_stream stream);

/* Advances one stream or several by one frame each, in one run of the model. `frames` are `count` structs, one after the
   other, all of the same struct_size; no stream twice. All are checked before any is used: after FS_ERROR_ARGUMENT,
   FS_ERROR_HANDLE, FS_ERROR_BUSY or FS_ERROR_FRAME no stream has advanced. After FS_ERROR_ENGINE no clock has moved, but
   the frame may have been written to memory where it is not visible; step again, or reset.
   FS_ERROR_NONFINITE: the model gave NaN or infinity for one stream or more, which `status` and `nonfinite` of their frames
   say. The memory of those streams was zeroed and they start again at position 0; all others have advanced as ever. Outputs
   can be borrowed of all of them, so that one can see which numbers are concerned. */
fs_status fs_step(fs_session session, fs_frame *frames, size_t count);

/* Borrows output `index` of the stream's last step, without a copy. It is valid until a step takes its place (the stream's
   next one, or a step of several streams whose places lie on both sides of this one's), or fs_set_labels, fs_warm_up or
   closing. The raw pointer must not be read after that: the memory holds other numbers, or is gone.
   FS_ERROR_STALE: the stream has no outputs. */
fs_status fs_output(fs_stream stream, size_t index, fs_tensor *tensor);

/* 1 while an output with this generation is valid, otherwise 0; also 0 for a handle that is none. */
int32_t fs_output_valid(fs_stream stream, uint64_t generation);

/* Runs one graph by itself for a stream, its states in place: `graph` counts as in fs_graph_describe, and `inputs` are
   `count` structs, one after the other, all of the same struct_size, that name every input of the graph once. Axes of any
   size may have another one in each run. No clock moves. It allocates nothing that grows once a size was seen.
   Graphs that write a common state take turns, as do runs of the same graph; all others, and steps whose graphs write none
   of its states, go on beside it. A graph may read a state while another writes it: the masks must hide the slots being
   written. A stream's reset, seek and figures do not concern it.
   FS_ERROR_ARGUMENT: an input is missing, unknown, or of another type or shape; nothing has run.
   FS_ERROR_ENGINE: the graph refused its inputs, such as a slot beyond the capacity.
   FS_ERROR_NONFINITE: an output has NaN or infinity. The states that the graph writes were zeroed for this stream; outputs
   can be borrowed. */
fs_status fs_run(fs_stream stream, size_t graph, const fs_input *inputs, size_t count);

/* Borrows output `index` of the last run of `graph` for the stream, until that graph's next run for it, or closing; waits
   for a run at work. fs_output_valid takes its generation too. FS_ERROR_STALE: it was not run yet. */
fs_status fs_run_output(fs_stream stream, size_t graph, size_t index, fs_tensor *tensor);

/* Forgets every frame so far. Outputs stay. */
fs_status fs_reset(fs_stream stream);

/* Frames since the last reset. */
fs_status fs_position(fs_stream stream, int64_t *position);

/* Sets the clock and leaves the memory as it is. For measurements, which take a full window without filling it, and for
   whoever writes the memory with fs_state_write. `position` is at least 0 and at most 2^62. */
fs_status fs_seek(fs_stream stream, int64_t position);

/* Copies the stream's memory of one state out or in; waits for runs at work. `bytes` must be fs_state_info's. */
fs_status fs_state_read(fs_stream stream, size_t index, void *data, size_t bytes);
fs_status fs_state_write(fs_stream stream, size_t index, const void *data, size_t bytes);

/* Writes the stream's memory and clock to a safetensors file, which is on the disk when this returns; whoever reads the
   file meanwhile, or after a power cut, sees the old or the new one. FS_ERROR_OUTPUT: it cannot be written. */
fs_status fs_state_save(fs_stream stream, const char *path);

/* Continues from a file that fs_state_save, or framestep in Python, wrote with the same model.
   FS_ERROR_STATE: missing, damaged, of another model, window or precision, or with NaN. The stream is unchanged then. After
   FS_ERROR_ENGINE it is as after fs_reset. */
fs_status fs_state_load(fs_stream stream, const char *path);

/* Counts frames that the caller let go because newer ones had come; they appear in fs_stats. */
fs_status fs_drop(fs_stream stream, uint64_t frames);

/* A stream's figures. Sorts the last latencies: for once a second, not for every frame. */
fs_status fs_stats_read(fs_stream stream, fs_stats *stats);

/* framestep: declarations end */

#ifdef __GNUC__
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#endif
