// Compiled engines in a bundle: which one fits a graph and a machine, and why the others do not. Needs no TensorRT.
#pragma once

#include <memory>
#include <string>

#include "file_io.h"
#include "manifest.h"

namespace framestep {

// Where an engine is to run.
struct Target {
    std::string flavour;             // the TensorRT that runs it, "tensorrt"
    std::string version;             // of that
    std::string compute_capability;  // of the GPU, "8.7"
};

// Why an engine cannot run on a machine, whatever its graph; empty where it can.
std::string machine_misfit(const EngineFile& engine, const Target& target, int streams);

// The engine of a graph that fits; of several, the one for the fewest streams. Throws Error(FS_ERROR_ENGINE): there is none;
// it says what is wrong with each that there is, and how to build one.
const EngineFile& find_engine(const Bundle& bundle, const Manifest& manifest, const Graph& graph, const Target& target,
                              int streams);

// The content of an engine's file, mapped, so that it takes no memory beside what TensorRT makes of it.
// Throws Error(FS_ERROR_ENGINE): missing, truncated, changed, or a link out of the bundle.
std::unique_ptr<MappedFile> read_engine(const Bundle& bundle, const EngineFile& engine);

}  // namespace framestep
