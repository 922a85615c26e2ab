// Which files an ONNX graph reads besides itself.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace framestep {

// Locations of the external data that the graph in `path` names, sorted, each once. Throws Error (FS_ERROR_BUNDLE): the
// file is not an ONNX graph, or cannot be read.
std::vector<std::string> external_files(const std::filesystem::path& path);

}  // namespace framestep
