#include "engine_files.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <map>

#include "onnx_files.h"
#include "sha256.h"

namespace framestep {
namespace {

namespace fs = std::filesystem;

const std::array<std::string_view, 4> PRECISIONS = {"fp16", "fp16+int8", "fp16+w4", "fp32"};  // that engines are built of

// "10.16.2" -> 10, 16, 2
std::vector<int> numbers(const std::string& text) {
    std::vector<int> found;
    for (size_t begin = 0; begin <= text.size();) {
        const size_t end = std::min(text.find('.', begin), text.size());
        int number = 0;
        const auto [stop, error] = std::from_chars(text.data() + begin, text.data() + end, number);
        if (error == std::errc() && stop == text.data() + end) found.push_back(number);
        begin = end + 1;
    }
    return found;
}

// Some packages leave the last number of their version out.
bool same_version(const std::string& built, const std::string& here) {
    if (built == here) return true;
    const std::vector<int> given = numbers(built), known = numbers(here);
    return given.size() >= 3 && given.size() < known.size() && std::equal(given.begin(), given.end(), known.begin());
}

bool runs_on_later(const EngineFile& engine, const std::string& version) {
    const std::vector<int> built = numbers(engine.version), here = numbers(version);
    const bool same_first = built.empty() || here.empty() ? built.empty() && here.empty() : built[0] == here[0];
    return engine.version_compatible && same_first && built <= here;
}

bool covers(const std::string& name, const std::string& capability) {
    if (name.empty() || name.back() != '+') return name == capability;
    return numbers(name.substr(0, name.size() - 1)) <= numbers(capability);
}

// Identifies a graph by the contents of all files that it reads; docs/design.md spells it out.
std::string source_key(const Bundle& bundle, const Graph& graph) {
    std::vector<std::string> names = external_files(bundle.path / graph.file);
    names.push_back(graph.file);
    std::map<std::string, std::string> used;
    for (const std::string& name : names) {
        const auto found = bundle.files.find(name);
        if (found == bundle.files.end()) return "";
        used[name] = found->second.sha256;
    }
    Json::Object hashes;
    for (const auto& [name, hash] : used) hashes.push_back({name, Json(hash)});
    return sha256_hex(std::string_view(dump_sorted(Json(std::move(hashes)))));
}

std::string misfit(const Bundle& bundle, const Manifest& manifest, const Graph& graph, const EngineFile& engine,
                   const Target& target, int streams) {
    if (engine.precision != manifest.precision) return "is " + engine.precision + ", not " + manifest.precision;
    if (engine.source != source_key(bundle, graph)) return "was built from another graph";
    return machine_misfit(engine, target, streams);
}

// What to type to get a fitting engine.
std::string build_command(const Bundle& bundle, const std::string& precision, int streams) {
    const std::string more = streams > 1 ? " --streams " + std::to_string(streams) : "";
    return "framestep build " + bundle.path.string() + " --precision " + precision + more;
}

}  // namespace

std::string machine_misfit(const EngineFile& engine, const Target& target, int streams) {
    if (engine.flavour != target.flavour) return "was built by " + engine.flavour + ", and here is " + target.flavour;
    if (!same_version(engine.version, target.version) && !runs_on_later(engine, target.version)) {
        return "was built by " + engine.flavour + " " + engine.version + ", and here is " + target.version;
    }
    std::string built;
    bool covered = false;
    for (const std::string& name : engine.compute_capabilities) {
        built += (built.empty() ? "" : ", ") + name;
        covered |= covers(name, target.compute_capability);
    }
    if (!covered) {
        return "was built for compute capability " + built + ", and this GPU has " + target.compute_capability;
    }
    if (engine.streams < streams) {
        return "takes at most " + counted(static_cast<size_t>(engine.streams), "stream") + ", and " + std::to_string(streams) +
               " are asked for";
    }
    return "";
}

const EngineFile& find_engine(const Bundle& bundle, const Manifest& manifest, const Graph& graph, const Target& target,
                              int streams) {
    if (std::find(PRECISIONS.begin(), PRECISIONS.end(), manifest.precision) == PRECISIONS.end()) {
        std::string known;
        for (const std::string_view name : PRECISIONS) known.append(known.empty() ? "" : ", ").append(name);
        throw Error(FS_ERROR_ENGINE, bundle.path.string() + ": TensorRT runs " + known + ", not " + manifest.precision +
                                         "; use one of these, or the engine 'onnxruntime'");
    }
    const EngineFile* fitting = nullptr;
    std::string seen;
    for (const EngineFile& engine : bundle.engines) {
        if (engine.graph != graph.name) continue;
        const std::string reason = misfit(bundle, manifest, graph, engine, target, streams);
        seen += (seen.empty() ? "" : "; ") + engine.file + " " + reason;
        if (reason.empty() && (fitting == nullptr || engine.streams < fitting->streams)) fitting = &engine;
    }
    if (fitting != nullptr) return *fitting;
    const std::string where = bundle.path.string() + ": ", named = "TensorRT engine of the graph '" + graph.name + "'";
    const std::string what = seen.empty() ? "has no " + named : "no " + named + " fits: " + seen;
    throw Error(FS_ERROR_ENGINE, where + what + "; run '" + build_command(bundle, manifest.precision, streams) + "'");
}

std::unique_ptr<MappedFile> read_engine(const Bundle& bundle, const EngineFile& engine) {
    const fs::path path = bundle.path / engine.file;
    const std::string again = "; run '" + build_command(bundle, engine.precision, engine.streams) + "'";
    const auto refuse = [&](const std::string& what) { throw Error(FS_ERROR_ENGINE, path.string() + ": " + what); };
    std::error_code failed;
    const fs::path root = fs::canonical(bundle.path, failed), real = fs::weakly_canonical(path, failed);
    if (failed || fs::is_symlink(path, failed) ||
        std::mismatch(root.begin(), root.end(), real.begin(), real.end()).first != root.end()) {
        refuse("leaves the bundle through a link; refused");
    }
    if (!fs::exists(path, failed)) refuse("missing" + again);
    auto file = std::make_unique<MappedFile>(path, FS_ERROR_ENGINE);
    const std::string_view content = file->bytes();
    if (content.size() != engine.bytes) {
        refuse("expected " + std::to_string(engine.bytes) + " bytes, found " + std::to_string(content.size()) + again);
    }
    if (sha256_hex(content) != engine.sha256) refuse("its content has changed" + again);
    return file;
}

}  // namespace framestep
