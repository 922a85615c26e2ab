// The engine over what TensorRT compiled; there where FRAMESTEP_TENSORRT was built in.
#pragma once

#include <memory>
#include <string>

#include "engine.h"
#include "engine_files.h"

namespace framestep {

// The TensorRT in `library` (empty: on the system's library path) and the first GPU. Throws Error(FS_ERROR_ENGINE): one is
// missing, or TensorRT is too old.
Target tensorrt_target(const std::string& library);

std::unique_ptr<Engine> make_tensorrt_engine(const Bundle& bundle, const Manifest& manifest, const Plan& plan,
                                             const EngineOptions& options);

}  // namespace framestep
