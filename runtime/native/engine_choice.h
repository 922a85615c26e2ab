// Which engine runs a bundle here, on which device and in which precision.
#pragma once

#include <memory>
#include <string>

#include "engine.h"

namespace framestep {

struct EngineChoice {
    std::string engine;  // as in EngineOptions
    std::string device;  // "cpu" or "cuda"
    const Manifest* manifest;
};

// Takes what is asked for, "auto" being the fastest that bundle and machine allow. `library` is that of an engine asked for,
// or ONNX Runtime's. Throws Error: FS_ERROR_ENGINE for an engine or device that is unknown, or that cannot be used here or for
// this precision; FS_ERROR_BUNDLE for a precision that the bundle does not have.
EngineChoice choose_engine(const Bundle& bundle, const std::string& engine, const std::string& device,
                           const std::string& precision, const std::string& library);

// Makes the engine that the options name.
std::unique_ptr<Engine> make_engine(const Bundle& bundle, const Manifest& manifest, const Plan& plan,
                                    const EngineOptions& options);

}  // namespace framestep
