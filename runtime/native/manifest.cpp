#include "manifest.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <set>
#include <thread>

#include "onnx_files.h"
#include "sha256.h"

namespace framestep {
namespace {

namespace fs = std::filesystem;

constexpr const char* MANIFEST = "manifest.json";
constexpr const char* FORMAT = "framestep";
constexpr int64_t VERSION = 1;
constexpr int64_t MAX_SIDE = 1 << 14;  // pixels
constexpr int64_t MAX_EXTENT = int64_t{1} << 31;
constexpr int64_t MAX_STATE_BYTES = int64_t{1} << 38;
constexpr size_t MAX_GRAPHS = 256;
constexpr size_t MAX_MANIFEST_BYTES = size_t{64} << 20;

const std::set<std::string> STREAM_ROLES = {"frame", "position", "output", "tokens", "embeddings", "position_ids",
                                            "write_index", "slot_mask", "slot_positions", "position_shift"};
const std::set<std::string> OTHER_ROLES = {"text_embeddings", "patch_text_embeddings", "logit_scale", "logit_bias",
                                           "input_ids"};
const std::map<std::string, fs_dtype> DTYPES = {
    {"uint8", FS_UINT8}, {"int64", FS_INT64},     {"int32", FS_INT32},     {"bool", FS_BOOL},
    {"int8", FS_INT8},   {"float32", FS_FLOAT32}, {"float16", FS_FLOAT16},
};
const std::map<std::string, Resize> RESIZES = {
    {"crop", Resize::crop}, {"stretch", Resize::stretch}, {"letterbox", Resize::letterbox}};

// What is wrong in the manifest; parse_manifest adds the path.
[[noreturn]] void refuse(const std::string& message) { throw Error(FS_ERROR_BUNDLE, message); }

std::string join(const std::string& where, const std::string& key) { return where.empty() ? key : where + "." + key; }

[[noreturn]] void mismatch(const std::string& where, const char* expected, const Json& found) {
    refuse((where.empty() ? "top level" : where) + ": expected " + expected + ", found " + kind_name(found.kind()));
}

std::string text(const Json& value, const std::string& where) {
    if (value.kind() != Json::Kind::string) mismatch(where, "a string", value);
    return value.as_string();
}

int64_t integer(const Json& value, const std::string& where) {
    if (value.kind() != Json::Kind::integer) mismatch(where, "an integer", value);
    return value.as_int();
}

double number(const Json& value, const std::string& where) {
    if (value.kind() != Json::Kind::integer && value.kind() != Json::Kind::number) mismatch(where, "a number", value);
    return value.as_double();
}

bool boolean(const Json& value, const std::string& where) {
    if (value.kind() != Json::Kind::boolean) mismatch(where, "true or false", value);
    return value.as_bool();
}

template <class T>
std::vector<T> list(const Json& value, const std::string& where, T (*read)(const Json&, const std::string&)) {
    if (value.kind() != Json::Kind::array) mismatch(where, "a list", value);
    std::vector<T> found;
    for (const Json& item : value.items()) {
        found.push_back(read(item, where + "[" + std::to_string(found.size()) + "]"));
    }
    return found;
}

// An object whose keys are known.
class Fields {
public:
    Fields(const Json& object, std::string where, std::initializer_list<const char*> known)
        : object_(object), where_(std::move(where)) {
        if (object.kind() != Json::Kind::object) mismatch(where_, "an object", object);
        for (const Json::Member& member : object.members()) {
            if (std::find(known.begin(), known.end(), member.name) != known.end()) continue;
            std::string names;
            for (const char* name : known) names += (names.empty() ? "" : ", ") + std::string(name);
            refuse(at(member.name) + ": unknown key; expected one of " + names);
        }
    }

    std::string at(const std::string& key) const { return join(where_, key); }

    const Json& need(const char* key) const {
        const Json* found = object_.find(key);
        if (found == nullptr) refuse(at(key) + ": missing");
        return *found;
    }

    // Null where it is absent: a key with a default that is not null.
    const Json* defaulted(const char* key) const { return object_.find(key); }

    // Null where it is absent or null.
    const Json* optional(const char* key) const {
        const Json* found = object_.find(key);
        return found == nullptr || found->kind() == Json::Kind::null ? nullptr : found;
    }

    // Null where it is null.
    const Json* need_or_null(const char* key) const {
        need(key);
        return optional(key);
    }

    std::string need_text(const char* key) const { return text(need(key), at(key)); }
    int64_t need_integer(const char* key) const { return integer(need(key), at(key)); }

private:
    const Json& object_;
    std::string where_;
};

fs_dtype read_dtype(const std::string& name, const std::string& what) {
    const auto found = DTYPES.find(name);
    if (found == DTYPES.end()) refuse(what + " has the unknown dtype '" + name + "'");
    return found->second;
}

Dim read_dim(const Json& value, const std::string& where) {
    if (value.kind() == Json::Kind::string) {
        const std::string& symbol = value.as_string();
        if (symbol.size() != 1 || std::string("SCBT").find(symbol) == std::string::npos) {
            refuse(where + ": '" + symbol + "' is no axis");
        }
        return {0, symbol[0]};
    }
    const int64_t size = integer(value, where);
    if (size < 1 || size > MAX_EXTENT) refuse(where + ": the size " + std::to_string(size) + " is not possible");
    return {size, 0};
}

Port read_port(const Json& value, const std::string& where) {
    const Fields fields(value, where, {"name", "role", "dtype", "shape", "states"});
    Port port{fields.need_text("name"), fields.need_text("role"), FS_FLOAT32, {}, {}};
    const std::string what = where + ": '" + port.name + "'";
    if (STREAM_ROLES.count(port.role) == 0 && OTHER_ROLES.count(port.role) == 0) {
        refuse(what + " has the unknown role '" + port.role + "'");
    }
    port.dtype = read_dtype(fields.need_text("dtype"), what);
    port.shape = list<Dim>(fields.need("shape"), fields.at("shape"), read_dim);
    if (port.shape.size() > FS_MAX_RANK) refuse(what + " has more than 8 axes");
    if (const Json* states = fields.optional("states")) {
        port.states = text(*states, fields.at("states"));
        if (port.states.empty()) refuse(what + " speaks of the states '', and there are none");
    }
    return port;
}

StateUse read_use(const Json& value, const std::string& where) {
    const Fields fields(value, where, {"state", "input", "output"});
    StateUse use{fields.need_text("state"), fields.need_text("input"), {}};
    const Json* output = fields.optional("output");
    if (output != nullptr) use.output = text(*output, fields.at("output"));
    if (use.input.empty() || (output != nullptr && use.output.empty())) {
        refuse(where + ": state '" + use.state + "' has an input or output without a name");
    }
    return use;
}

Graph read_graph(const std::string& name, const Json& value, const std::string& where) {
    const Fields fields(value, where, {"file", "inputs", "outputs", "states"});
    Graph graph{name, fields.need_text("file"), {}, {}, {}};
    graph.inputs = list<Port>(fields.need("inputs"), fields.at("inputs"), read_port);
    graph.outputs = list<Port>(fields.need("outputs"), fields.at("outputs"), read_port);
    if (const Json* states = fields.defaulted("states")) {
        graph.states = list<StateUse>(*states, fields.at("states"), read_use);
    }
    return graph;
}

std::vector<Graph> read_graphs(const Json& value, const std::string& where) {
    if (value.kind() != Json::Kind::object) mismatch(where, "an object", value);
    std::vector<Graph> graphs;
    for (const Json::Member& member : value.members()) {
        graphs.push_back(read_graph(member.name, member.value, join(where, member.name)));
    }
    return graphs;
}

State read_state(const Json& value, const std::string& where) {
    const Fields fields(value, where, {"name", "kind", "shape", "axis", "capacity", "rows_per_slot", "dtype"});
    State state{fields.need_text("name"), fields.need_text("kind"), FS_FLOAT32, {}, 0, 0, 0};
    const std::string what = "states '" + state.name + "'";
    if (state.kind != "ring" && state.kind != "linear") {
        refuse(what + ": kind '" + state.kind + "' is unknown; expected ring or linear");
    }
    state.dtype = read_dtype(fields.need_text("dtype"), what);
    if (state.dtype != FS_FLOAT32 && state.dtype != FS_FLOAT16 && state.dtype != FS_INT8) {
        refuse(what + ": a state is float32, float16 or int8");
    }
    const std::vector<Dim> shape = list<Dim>(fields.need("shape"), fields.at("shape"), read_dim);
    if (shape.empty() || shape.size() > FS_MAX_RANK || shape[0].symbol != 'S') {
        refuse(what + ": shape should be 'S' and then at most 7 positive sizes");
    }
    int64_t total = static_cast<int64_t>(bytes_of(state.dtype));
    for (size_t axis = 1; axis < shape.size(); ++axis) {
        if (shape[axis].symbol != 0) refuse(what + ": shape should be 'S' and then positive sizes");
        if (shape[axis].size > MAX_STATE_BYTES / total) {
            refuse(what + ": takes more than " + std::to_string(MAX_STATE_BYTES) + " bytes a stream");
        }
        total *= shape[axis].size;
        state.shape.push_back(shape[axis].size);
    }
    const int64_t axis = fields.need_integer("axis");
    if (axis < 1 || axis >= static_cast<int64_t>(shape.size())) {
        refuse(what + ": axis " + std::to_string(axis) + " is outside of its shape");
    }
    state.axis = static_cast<int>(axis) - 1;
    state.capacity = fields.need_integer("capacity");
    state.rows_per_slot = fields.need_integer("rows_per_slot");
    const int64_t rows = state.shape[state.axis];
    if (state.capacity < 1 || state.rows_per_slot < 1 || state.capacity > rows ||
        rows % state.capacity != 0 || rows / state.capacity != state.rows_per_slot) {
        refuse(what + ": capacity * rows_per_slot does not fill its axis");
    }
    return state;
}

FileEntry read_file_entry(const Json& value, const std::string& where) {
    const Fields fields(value, where, {"bytes", "sha256"});
    const int64_t bytes = fields.need_integer("bytes");
    if (bytes < 0) refuse(fields.at("bytes") + ": expected at least 0");
    return {static_cast<uint64_t>(bytes), fields.need_text("sha256")};
}

EngineFile read_engine_file(const std::string& name, const Json& value, const std::string& where) {
    const Fields fields(value, where,
                        {"graph", "precision", "flavour", "version", "compute_capabilities", "streams", "source", "bytes",
                         "sha256", "labels", "attention", "version_compatible"});
    const std::string folder = "engines/", ending = ".engine";
    const size_t digits = name.find_first_not_of("0123456789abcdef", folder.size());
    if (name.compare(0, folder.size(), folder) != 0 || digits == std::string::npos || digits == folder.size() ||
        name.compare(digits, std::string::npos, ending) != 0) {
        refuse("the engine '" + name + "' should be engines/FINGERPRINT.engine; refused");
    }
    EngineFile engine{};
    engine.file = name;
    engine.graph = fields.need_text("graph");
    engine.precision = fields.need_text("precision");
    engine.flavour = fields.need_text("flavour");
    engine.version = fields.need_text("version");
    engine.compute_capabilities =
        list<std::string>(fields.need("compute_capabilities"), fields.at("compute_capabilities"), text);
    engine.streams = fields.need_integer("streams");
    engine.source = fields.need_text("source");
    const int64_t bytes = fields.need_integer("bytes");
    if (bytes < 0) refuse(fields.at("bytes") + ": expected at least 0");
    engine.bytes = static_cast<uint64_t>(bytes);
    engine.sha256 = fields.need_text("sha256");
    if (const Json* labels = fields.optional("labels")) engine.labels = integer(*labels, fields.at("labels"));
    if (const Json* attention = fields.defaulted("attention")) text(*attention, fields.at("attention"));
    if (const Json* later = fields.defaulted("version_compatible")) {
        engine.version_compatible = boolean(*later, fields.at("version_compatible"));
    }
    return engine;
}

std::vector<std::string> output_names(const Manifest& manifest) {
    std::vector<std::string> names;
    for (const Graph& graph : manifest.graphs) {
        for (const Port& port : graph.outputs) names.push_back(port.name);
    }
    return names;
}

void check_graph(const Graph& graph, const std::set<std::string>& states, const std::set<std::string>& outputs) {
    const std::string where = "graphs." + graph.name + ": ";
    bool of_streams = false;
    const auto check_first_axis = [&](const Port& port) {
        // buffers are cut along this axis; without it a step would write beside them
        if (port.shape.empty() || port.shape[0].symbol != 'S') {
            refuse(where + "'" + port.name + "' should have 'S' as its first axis");
        }
    };
    const auto check_states = [&](const Port& port) {
        const std::string group = port.states + ".";
        if (!port.states.empty() && std::none_of(states.begin(), states.end(), [&](const std::string& state) {
                return state.compare(0, group.size(), group) == 0;
            })) {
            refuse(where + "'" + port.name + "' speaks of the states '" + port.states + "', and there are none");
        }
    };
    std::set<std::string> names;
    for (const Port& port : graph.inputs) {
        if (!names.insert(port.name).second) refuse(where + "the input '" + port.name + "' stands twice");
        if (port.role == "output" && outputs.count(port.name) == 0) {
            refuse(where + "no graph has the output '" + port.name + "' that it takes");
        }
        if (STREAM_ROLES.count(port.role) != 0) {
            of_streams = true;
            check_first_axis(port);
        }
        check_states(port);
    }
    std::for_each(graph.outputs.begin(), graph.outputs.end(), check_states);
    if (of_streams) std::for_each(graph.outputs.begin(), graph.outputs.end(), check_first_axis);
    for (const StateUse& use : graph.states) {
        if (states.count(use.state) == 0) refuse(where + "state '" + use.state + "' is not declared");
    }
}

// What parts beside the graphs name in them: by its key, a graph or an output.
struct Named {
    std::map<std::string, std::string> graphs, outputs;
};

// What one part alone does not say.
void check_references(const Manifest& manifest, const Named& named) {
    std::set<std::string> states;
    for (const State& state : manifest.states) {
        if (!states.insert(state.name).second) refuse("states: a name stands twice");
    }
    if (manifest.graphs.size() > MAX_GRAPHS) {
        refuse("graphs: " + std::to_string(manifest.graphs.size()) + " are more than " + std::to_string(MAX_GRAPHS));
    }
    const std::vector<std::string> names = output_names(manifest);
    const std::set<std::string> outputs(names.begin(), names.end());
    if (outputs.size() != names.size()) refuse("graphs: two outputs have the same name");
    for (const Graph& graph : manifest.graphs) check_graph(graph, states, outputs);
    graphs_for(manifest, names);
    for (const auto& [key, name] : named.graphs) {
        if (std::none_of(manifest.graphs.begin(), manifest.graphs.end(),
                         [&name = name](const Graph& graph) { return graph.name == name; })) {
            refuse(key + ": there is no graph '" + name + "'");
        }
    }
    for (const auto& [key, name] : named.outputs) {
        if (outputs.count(name) == 0) refuse(key + ": no graph has the output '" + name + "'");
    }
}

void check_name(const std::string& name) {
    const fs::path path(name);
    bool leaves = name.empty() || path.is_absolute() || name.find('\\') != std::string::npos ||
                  name.find('\0') != std::string::npos || name == MANIFEST;
    for (const fs::path& part : path) leaves = leaves || part == "..";
    if (leaves) refuse("the path '" + name + "' leaves the bundle; refused");
}

std::string read_text(const fs::path& folder) {
    std::error_code ignored;
    if (!fs::exists(folder, ignored)) refuse(folder.string() + ": no such bundle");
    if (!fs::is_directory(folder, ignored)) refuse(folder.string() + ": is a file; give the bundle's folder");
    const fs::path path = folder / MANIFEST;
    if (!fs::exists(path, ignored)) refuse(folder.string() + ": not a bundle, manifest.json is missing");
    std::error_code failed;
    const uintmax_t size = fs::is_regular_file(path, ignored) ? fs::file_size(path, failed) : MAX_MANIFEST_BYTES + 1;
    if (failed || size > MAX_MANIFEST_BYTES) refuse(path.string() + ": cannot be read as a manifest");
    std::string content(static_cast<size_t>(size), '\0');
    std::ifstream file(path, std::ios::binary);
    file.read(content.data(), static_cast<std::streamsize>(content.size()));
    if (!file || file.gcount() != static_cast<std::streamsize>(size)) refuse(path.string() + ": cannot be read");
    return content;
}

void check_listed(const Bundle& bundle) {
    for (const std::string& name : bundle.used_files) {
        if (bundle.files.count(name) == 0) {
            refuse((bundle.path / MANIFEST).string() + ": '" + name + "' is used but not listed under files");
        }
    }
}

void check_files(const Bundle& bundle) {
    std::error_code failed;
    const fs::path root = fs::canonical(bundle.path, failed);
    for (const auto& [name, entry] : bundle.files) {
        const fs::path path = bundle.path / name;
        const std::string where = path.string();
        if (!fs::is_regular_file(path, failed)) refuse(where + ": missing; export the bundle again");
        const fs::path real = fs::canonical(path, failed);
        if (failed || std::mismatch(root.begin(), root.end(), real.begin(), real.end()).first != root.end()) {
            refuse(where + ": leaves the bundle through a link; refused");
        }
        const uintmax_t size = fs::file_size(path, failed);
        if (failed || size != entry.bytes) {
            refuse(where + ": expected " + std::to_string(entry.bytes) + " bytes, found " + std::to_string(size) +
                   "; export the bundle again");
        }
    }
    std::set<std::string> seen;
    for (const Manifest& manifest : bundle.precisions) {
        for (const Graph& graph : manifest.graphs) {
            if (!seen.insert(graph.file).second) continue;
            const fs::path path = bundle.path / graph.file;
            for (const std::string& location : external_files(path)) {
                if (bundle.files.count(location) == 0) {
                    refuse(path.string() + ": graph '" + graph.name + "' reads external data '" + location +
                           "', which the manifest does not list; refused");
                }
            }
        }
    }
}

void check_hashes(const Bundle& bundle) {
    std::vector<std::pair<std::string, std::string>> found;  // name and digest
    for (const auto& item : bundle.files) found.emplace_back(item.first, "");
    std::vector<std::thread> workers;
    std::vector<std::exception_ptr> errors(std::max(1u, std::thread::hardware_concurrency()));
    const auto hash = [&](size_t worker) {
        try {
            for (size_t at = worker; at < found.size(); at += errors.size()) {
                found[at].second = sha256_hex(bundle.path / found[at].first);
            }
        } catch (...) {
            errors[worker] = std::current_exception();
        }
    };
    workers.reserve(errors.size());
    for (size_t worker = 0; worker < errors.size(); ++worker) {
        try {
            workers.emplace_back(hash, worker);
        } catch (const std::exception&) {  // no more threads are to be had
            hash(worker);
        }
    }
    for (std::thread& worker : workers) worker.join();
    for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
    }
    for (const auto& [name, digest] : found) {
        const std::string& expected = bundle.files.at(name).sha256;
        if (digest != expected) {
            refuse((bundle.path / name).string() + ": its content has changed (SHA-256 " + digest.substr(0, 12) +
                   "…, expected " + expected.substr(0, 12) + "…); export the bundle again");
        }
    }
}

void read_language(const Json& value, Bundle& bundle, Named& named) {
    const Fields fields(value, "language",
                        {"embed", "decoder", "rebase", "visual", "positions", "chunk", "tokenizer", "tokens", "stop",
                         "chat", "cross"});
    for (const char* key : {"embed", "decoder", "rebase"}) named.graphs[fields.at(key)] = fields.need_text(key);
    if (const Json* visual = fields.need_or_null("visual")) {
        named.outputs["language.visual"] = text(*visual, "language.visual");
    }
    for (const char* key : {"positions", "chunk"}) {
        const int64_t number = fields.need_integer(key);
        if (number < 1) refuse(fields.at(key) + ": expected at least 1, found " + std::to_string(number));
    }
    if (const Json* cross = fields.optional("cross")) {
        const Fields parts(*cross, "language.cross", {"graph", "rebase", "positions"});
        named.graphs["language.cross.graph"] = parts.need_text("graph");
        if (const Json* rebase = parts.need_or_null("rebase")) {
            named.graphs["language.cross.rebase"] = text(*rebase, "language.cross.rebase");
        }
        const std::string positions = parts.need_text("positions");
        if (positions != "parallel" && positions != "literal") {
            refuse("language.cross.positions: '" + positions + "' is unknown; expected parallel or literal");
        }
    }
    const Json& tokens = fields.need("tokens");
    if (tokens.kind() != Json::Kind::object) mismatch("language.tokens", "an object", tokens);
    for (const Json::Member& token : tokens.members()) integer(token.value, join("language.tokens", token.name));
    list<int64_t>(fields.need("stop"), "language.stop", integer);
    if (const Json* chat = fields.defaulted("chat")) text(*chat, "language.chat");
    if (const Json* tokenizer = fields.need_or_null("tokenizer")) {
        bundle.used_files.push_back(text(*tokenizer, "language.tokenizer"));
    }
}

void read_manifest(const Json& root, Bundle& bundle) {
    const Fields fields(root, "",
                        {"format", "version", "family", "precision", "frame", "graphs", "states", "origin", "rate", "grid",
                         "scoring", "labels", "text", "language", "files", "variants", "engines"});
    fields.need_text("family");
    const Fields origin(fields.need("origin"), "origin", {"checkpoint", "framestep", "trained_frames"});
    origin.need_text("checkpoint");
    origin.need_text("framestep");
    if (const Json* frames = origin.optional("trained_frames")) integer(*frames, "origin.trained_frames");

    const Fields frame(fields.need("frame"), "frame", {"height", "width", "resize"});
    const int64_t height = frame.need_integer("height"), width = frame.need_integer("width");
    if (height < 1 || height > MAX_SIDE || width < 1 || width > MAX_SIDE) {
        refuse("frame: height and width should be from 1 to " + std::to_string(MAX_SIDE));
    }
    bundle.height = static_cast<int>(height);
    bundle.width = static_cast<int>(width);
    if (const Json* resize = frame.defaulted("resize")) {
        const auto found = RESIZES.find(text(*resize, "frame.resize"));
        if (found == RESIZES.end()) refuse("frame.resize: expected crop, stretch or letterbox");
        bundle.resize = found->second;
    }
    if (const Json* rate = fields.optional("rate")) {
        bundle.rate = number(*rate, "rate");
        if (!(bundle.rate > 0) || std::isinf(bundle.rate)) refuse("rate: expected a number above 0");
    }
    if (const Json* grid = fields.optional("grid")) list<int64_t>(*grid, "grid", integer);
    if (const Json* scoring = fields.optional("scoring")) {
        const Fields numbers(*scoring, "scoring", {"logit_scale", "logit_bias", "head", "calibrated"});
        if (const Json* head = numbers.need_or_null("head")) text(*head, "scoring.head");
        boolean(numbers.need("calibrated"), "scoring.calibrated");
        bundle.scoring = Scoring{number(numbers.need("logit_scale"), "scoring.logit_scale"),
                                 number(numbers.need("logit_bias"), "scoring.logit_bias")};
    }
    if (const Json* labels = fields.optional("labels")) {
        const Fields parts(*labels, "labels", {"names", "file", "background"});
        bundle.labels = Labels{list<std::string>(parts.need("names"), "labels.names", text), parts.need_text("file")};
        bundle.used_files.push_back(bundle.labels->file);
        if (const Json* background = parts.optional("background")) text(*background, "labels.background");
    }
    Named named;
    if (const Json* words = fields.optional("text")) {
        const Fields parts(*words, "text", {"graph", "tokenizer", "length", "templates", "patch_templates"});
        bundle.has_text = true;
        named.graphs["text.graph"] = parts.need_text("graph");
        bundle.used_files.push_back(parts.need_text("tokenizer"));
        parts.need_integer("length");
        list<std::string>(parts.need("templates"), "text.templates", text);
        list<std::string>(parts.need("patch_templates"), "text.patch_templates", text);
    }
    if (const Json* language = fields.optional("language")) read_language(*language, bundle, named);
    if (const Json* files = fields.defaulted("files")) {
        if (files->kind() != Json::Kind::object) mismatch("files", "an object", *files);
        for (const Json::Member& member : files->members()) {
            check_name(member.name);
            bundle.files.emplace(member.name, read_file_entry(member.value, join("files", member.name)));
        }
    }
    if (const Json* engines = fields.defaulted("engines")) {
        if (engines->kind() != Json::Kind::object) mismatch("engines", "an object", *engines);
        for (const Json::Member& member : engines->members()) {
            bundle.engines.push_back(read_engine_file(member.name, member.value, join("engines", member.name)));
        }
    }

    Manifest main;
    main.precision = fields.need_text("precision");
    main.graphs = read_graphs(fields.need("graphs"), "graphs");
    main.states = list<State>(fields.need("states"), "states", read_state);
    main.states_as_written = fields.need("states");
    bundle.precisions.push_back(main);
    if (const Json* variants = fields.defaulted("variants")) {
        if (variants->kind() != Json::Kind::object) mismatch("variants", "an object", *variants);
        for (const Json::Member& member : variants->members()) {
            const std::string where = join("variants", member.name);
            const Fields parts(member.value, where, {"graphs", "states"});
            if (member.name == main.precision) refuse(where + ": is the precision of the bundle's own graphs");
            Manifest variant = main;
            variant.precision = member.name;
            for (Graph& graph : read_graphs(parts.need("graphs"), join(where, "graphs"))) {
                const auto same = std::find_if(variant.graphs.begin(), variant.graphs.end(),
                                               [&](const Graph& other) { return other.name == graph.name; });
                if (same != variant.graphs.end()) {
                    *same = std::move(graph);
                } else {
                    variant.graphs.push_back(std::move(graph));
                }
            }
            variant.states = list<State>(parts.need("states"), join(where, "states"), read_state);
            variant.states_as_written = parts.need("states");
            bundle.precisions.push_back(std::move(variant));
        }
    }
    for (const Manifest& manifest : bundle.precisions) {
        check_references(manifest, named);
        for (const Graph& graph : manifest.graphs) bundle.used_files.push_back(graph.file);
    }
    for (const std::string& name : bundle.used_files) check_name(name);
    for (const Manifest& manifest : bundle.precisions) {
        for (const Graph& graph : manifest.graphs) {
            // external data is looked for beside the graph, and listed as beside the manifest
            if (graph.file.find('/') == std::string::npos) continue;
            refuse("graphs." + graph.name + ".file: '" + graph.file + "' should lie beside the manifest");
        }
    }
}

}  // namespace

size_t State::bytes() const {
    size_t total = bytes_of(dtype);
    for (const int64_t size : shape) total *= static_cast<size_t>(size);
    return total;
}

bool Manifest::has_int8_memory() const {
    return std::any_of(states.begin(), states.end(), [](const State& state) { return state.dtype == FS_INT8; });
}

Bundle parse_manifest(std::string_view content, const std::filesystem::path& path) {
    const std::string where = (path / MANIFEST).string() + ": ";
    Bundle bundle;
    bundle.path = path;
    try {
        const Json root = Json::parse(content);
        const Json* format = root.kind() == Json::Kind::object ? root.find("format") : nullptr;
        if (format == nullptr || format->kind() != Json::Kind::string || format->as_string() != FORMAT) {
            refuse("not a framestep manifest (format should be 'framestep')");
        }
        const Json* version = root.find("version");
        if (version == nullptr || version->kind() != Json::Kind::integer || version->as_int() != VERSION) {
            refuse("another bundle version than 1, which this framestep reads; export the bundle again or use a"
                   " matching framestep");
        }
        read_manifest(root, bundle);
    } catch (const Error& error) {
        throw Error(FS_ERROR_BUNDLE, where + error.message);
    }
    return bundle;
}

Bundle Bundle::open(const std::filesystem::path& folder, const std::string& manifest, bool trust) {
    Bundle bundle = parse_manifest(manifest.empty() ? read_text(folder) : manifest, folder);
    if (trust) return bundle;
    check_listed(bundle);
    check_files(bundle);
    check_hashes(bundle);
    return bundle;
}

const Manifest& Bundle::at(const std::string& precision) const {
    std::string known;
    for (const Manifest& manifest : precisions) {
        if (manifest.precision == precision) return manifest;
        known += (known.empty() ? "" : ", ") + manifest.precision;
    }
    refuse("precision '" + precision + "' is not in this bundle; it has " + known);
}

const Manifest& Bundle::choose(const std::string& precision, const std::string& device,
                               const std::set<std::string>& preferred) const {
    if (precision != "auto") return at(precision);
    // A CPU widens every FP16 number before it computes with it.
    const std::vector<std::string> order = device == "cpu"
                                               ? std::vector<std::string>{"int8", "fp32"}
                                               : std::vector<std::string>{"fp16", "fp32", "fp16+int8", "int8"};
    std::vector<const Manifest*> known, wanted;
    for (const Manifest& manifest : precisions) {
        if (manifest.has_int8_memory()) continue;
        known.push_back(&manifest);
        if (preferred.count(manifest.precision) != 0) wanted.push_back(&manifest);
    }
    if (!wanted.empty()) known = std::move(wanted);
    for (const std::string& name : order) {
        for (const Manifest* manifest : known) {
            if (manifest->precision == name) return *manifest;
        }
    }
    if (!known.empty()) return *known.front();
    for (const Manifest& manifest : precisions) {
        // A CPU reads INT8 memory beside float32 alone.
        if (device != "cpu" || manifest.precision.rfind("fp16", 0) != 0) return manifest;
    }
    return precisions.front();
}

std::string Bundle::state_key(const Manifest& manifest) const {
    std::map<std::string, std::string> used;
    for (const Graph& graph : manifest.graphs) {
        if (graph.states.empty()) continue;
        std::vector<std::string> names = external_files(path / graph.file);
        names.push_back(graph.file);
        for (const std::string& name : names) {
            const auto found = files.find(name);
            if (found == files.end()) return "";
            used[name] = found->second.sha256;
        }
    }
    Json::Object hashes;
    for (const auto& [name, hash] : used) hashes.push_back({name, Json(hash)});
    Json::Object parts;
    parts.push_back({"files", Json(std::move(hashes))});
    parts.push_back({"precision", Json(manifest.precision)});
    parts.push_back({"states", manifest.states_as_written});
    return sha256_hex(std::string_view(dump_sorted(Json(std::move(parts)))));
}

std::vector<const Graph*> graphs_for(const Manifest& manifest, const std::vector<std::string>& outputs) {
    std::map<std::string, const Graph*> makers;
    for (const Graph& graph : manifest.graphs) {
        for (const Port& port : graph.outputs) makers[port.name] = &graph;
    }
    std::vector<const Graph*> order;
    std::set<const Graph*> entered;
    const std::function<void(const std::string&)> visit = [&](const std::string& output) {
        const auto maker = makers.find(output);
        if (maker == makers.end()) refuse("no output '" + output + "' in this bundle");
        const Graph* graph = maker->second;
        if (std::find(order.begin(), order.end(), graph) != order.end()) return;
        if (!entered.insert(graph).second) refuse("graphs: they feed each other in a circle");
        for (const Port& port : graph->inputs) {
            if (port.role == "output") visit(port.name);
        }
        order.push_back(graph);
    };
    for (const std::string& output : outputs) visit(output);
    return order;
}

size_t bytes_of(fs_dtype dtype) {
    switch (dtype) {
        case FS_INT64: return 8;
        case FS_INT32:
        case FS_FLOAT32: return 4;
        case FS_FLOAT16: return 2;
        default: return 1;
    }
}

const char* name_of(fs_dtype dtype) {
    for (const auto& [name, known] : DTYPES) {
        if (known == dtype) return name.c_str();
    }
    return "unknown";
}

}  // namespace framestep
