// A bundle: a folder with manifest.json, step graphs as ONNX, and their weights. docs/design.md tells the contract.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "error.h"
#include "json.h"
#include "preprocess.h"

namespace framestep {

// A size, or the symbol of an axis: 'S' streams, 'C' labels, 'B' texts, 'T' tokens.
struct Dim {
    int64_t size = 0;
    char symbol = 0;

    bool operator==(const Dim& other) const { return size == other.size && symbol == other.symbol; }
};

struct Port {
    std::string name;
    std::string role;
    fs_dtype dtype;
    std::vector<Dim> shape;
    std::string states;  // what it speaks of begins with this and a dot; empty where there is one kind of states
};

// How a graph touches a state; `output` is empty where it only reads it.
struct StateUse {
    std::string state;
    std::string input;
    std::string output;
};

struct Graph {
    std::string name;
    std::string file;
    std::vector<Port> inputs;
    std::vector<Port> outputs;
    std::vector<StateUse> states;
};

struct State {
    std::string name;
    std::string kind;
    fs_dtype dtype;
    std::vector<int64_t> shape;  // of one stream
    int axis;                    // of the slots, in `shape`
    int64_t capacity;
    int64_t rows_per_slot;

    size_t bytes() const;  // of one stream
};

struct Scoring {
    double logit_scale;
    double logit_bias;
};

struct Labels {
    std::vector<std::string> names;
    std::string file;
};

// The manifest of one precision.
struct Manifest {
    std::string precision;
    std::vector<Graph> graphs;
    std::vector<State> states;
    Json states_as_written;  // for the state key

    bool has_int8_memory() const;  // which only some engines run
};

struct FileEntry {
    uint64_t bytes;
    std::string sha256;
};

// What TensorRT compiled from a graph, in one precision, for some GPUs. Whether it fits is seen when it is loaded.
struct EngineFile {
    std::string file;
    std::string graph;
    std::string precision;
    std::string flavour;  // the package that compiled it, and that runs it
    std::string version;  // of that
    std::vector<std::string> compute_capabilities;
    int64_t streams;
    std::string source;  // identifies the graph
    uint64_t bytes;
    std::string sha256;
    int64_t labels;  // the most that it takes; 0: it takes none
    bool version_compatible;
};

struct Bundle {
    std::filesystem::path path;
    int height = 0;
    int width = 0;
    Resize resize = Resize::crop;
    double rate = 0;  // 0: every frame
    std::optional<Scoring> scoring;
    std::optional<Labels> labels;
    bool has_text = false;  // other labels can be made from words
    std::vector<std::string> used_files;
    std::map<std::string, FileEntry> files;
    std::vector<Manifest> precisions;  // the bundle's own first
    std::vector<EngineFile> engines;

    // Reads the manifest, or takes `manifest` for it where that is not empty, and checks that every file is listed, there,
    // and unchanged. With `trust` the caller has checked the files. Throws Error(FS_ERROR_BUNDLE).
    static Bundle open(const std::filesystem::path& folder, const std::string& manifest, bool trust);

    // Throws Error(FS_ERROR_BUNDLE): the bundle does not have it.
    const Manifest& at(const std::string& precision) const;

    // The precision asked for, or for "auto" the fastest one that the device runs well; of those `preferred`, if there are
    // any, and none whose memory is INT8 unless there is no other. (A bundle whose own has it: see choose_engine.)
    const Manifest& choose(const std::string& precision, const std::string& device,
                           const std::set<std::string>& preferred = {}) const;

    // Identifies what a saved state fits. Empty where files are not listed, as in a bundle in the making.
    std::string state_key(const Manifest& manifest) const;
};

// The manifest's text as a bundle in `path`, without a look at the files. Throws Error(FS_ERROR_BUNDLE).
Bundle parse_manifest(std::string_view text, const std::filesystem::path& path);

// The graphs that compute these outputs, each after those that feed it. Throws Error(FS_ERROR_BUNDLE).
std::vector<const Graph*> graphs_for(const Manifest& manifest, const std::vector<std::string>& outputs);

size_t bytes_of(fs_dtype dtype);
const char* name_of(fs_dtype dtype);

}  // namespace framestep
