#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "error.h"
#include "log.h"
#include "ort_api.h"

namespace framestep {
namespace {

constexpr int OLDEST[] = {1, 25};  // the first with the operators of our graphs
constexpr const char* VARIABLE = "FRAMESTEP_ONNXRUNTIME";
constexpr const char* TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY";
constexpr const char* SYSTEM_NAMES[] = {"libonnxruntime.so.1", "libonnxruntime.so"};

std::string one_line(const char* message) {
    std::string line;
    for (const char* at = message; *at != '\0' && line.size() < 300; ++at) {
        const bool space = *at == '\n' || *at == '\t' || *at == '\r' || *at == ' ';
        if (!space) {
            line += *at;
        } else if (!line.empty() && line.back() != ' ') {
            line += ' ';
        }
    }
    return line;
}

void pass_on(void*, int severity, const char*, const char*, const char*, const char* message) {
    log(severity > ORT_WARNING ? FS_LOG_ERROR : severity == ORT_WARNING ? FS_LOG_WARNING : FS_LOG_INFO,
        "ONNX Runtime: " + one_line(message));
}

// The library at one place, or null with the reason added to `tried`.
void* open_library(const std::string& place, std::string& tried) {
    void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* reason = dlerror();
        tried += (tried.empty() ? "" : "; ") + place + " (" + one_line(reason == nullptr ? "unknown" : reason) + ")";
    }
    return library;
}

void* find_library(const std::string& path, std::string& place) {
    std::string tried;
    const char* variable = std::getenv(VARIABLE);
    std::vector<std::string> places;
    if (!path.empty()) {
        places = {path};
    } else if (variable != nullptr && *variable != '\0') {
        places = {variable};
    } else {
        places.assign(std::begin(SYSTEM_NAMES), std::end(SYSTEM_NAMES));
    }
    for (const std::string& candidate : places) {
        if (void* library = open_library(candidate, tried)) {
            place = candidate;
            return library;
        }
    }
    throw Error(FS_ERROR_ENGINE, "ONNX Runtime's shared library was not found; tried " + tried + "; give its path as the option"
                " 'library' or in " + VARIABLE + " (pip install onnxruntime has it in its folder capi)");
}

void check_version(const std::string& version, const std::string& place) {
    int major = 0, minor = 0;
    if (std::sscanf(version.c_str(), "%d.%d", &major, &minor) != 2) {
        throw Error(FS_ERROR_ENGINE, place + ": is not ONNX Runtime: its version is '" + one_line(version.c_str()) + "'");
    }
    if (major < OLDEST[0] || (major == OLDEST[0] && minor < OLDEST[1])) {
        throw Error(FS_ERROR_ENGINE, place + ": ONNX Runtime " + version + " is too old; framestep needs " +
                                         std::to_string(OLDEST[0]) + "." + std::to_string(OLDEST[1]) + " or later");
    }
}

Ort load(void* library, const std::string& place) {
    using GetBase = const OrtApiBase* (*)();
    const auto get_base = reinterpret_cast<GetBase>(dlsym(library, "OrtGetApiBase"));
    if (get_base == nullptr) throw Error(FS_ERROR_ENGINE, place + ": is not ONNX Runtime: OrtGetApiBase is missing");
    const OrtApiBase* base = get_base();
    Ort ort;
    ort.path = place;
    ort.version = base->GetVersionString();
    check_version(ort.version, place);
    const void* const* table = base->GetApi(ORT_API_VERSION_USED);
    if (table == nullptr) throw Error(FS_ERROR_ENGINE, place + ": ONNX Runtime " + ort.version + " refuses its own API");
    // From 1.29 on it would report every session over the network, from a thread and through a database in the user's home.
    setenv(TELEMETRY_VARIABLE, "1", 0);
#define X(number, name, ...) ort.name = reinterpret_cast<decltype(ort.name)>(const_cast<void*>(table[number]));
    FRAMESTEP_ORT_CALLS(X)
    FRAMESTEP_ORT_RELEASES(X)
#undef X
    ort.GetErrorMessage = reinterpret_cast<decltype(ort.GetErrorMessage)>(const_cast<void*>(table[2]));
    ort.check(ort.CreateEnvWithCustomLogger(pass_on, nullptr, ORT_WARNING, "framestep", &ort.env), place);
    return ort;
}

}  // namespace

void Ort::check(OrtStatus* status, std::string_view what) const {
    if (status == nullptr) return;
    const std::string message = one_line(GetErrorMessage(status));
    ReleaseStatus(status);
    throw Error(FS_ERROR_ENGINE, std::string(what) + ": " + message);
}

const Ort& load_ort(const std::string& path) {
    static std::mutex lock;
    static auto& loaded = *new std::map<void*, Ort>;  // never freed: ONNX Runtime's threads may outlive static objects
    std::lock_guard guard(lock);
    std::string place;
    void* library = find_library(path, place);  // the same number for a library that is loaded already
    const auto found = loaded.find(library);
    if (found != loaded.end()) {
        dlclose(library);  // counts down to the first load
        return found->second;
    }
    try {
        return loaded.emplace(library, load(library, place)).first->second;
    } catch (...) {
        dlclose(library);
        throw;
    }
}

}  // namespace framestep
