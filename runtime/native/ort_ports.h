// What a graph takes and gives, compared with what the manifest says of it.
#pragma once

#include <string>

#include "manifest.h"
#include "ort_api.h"

namespace framestep {

// Buffers are bound by the manifest alone. Throws Error(FS_ERROR_BUNDLE), naming the file at `path`, where a session of the
// graph has other inputs or outputs.
void check_ports(const Ort& ort, OrtNativeSession* session, const std::string& path, const Graph& graph, const Manifest& manifest);

}  // namespace framestep
