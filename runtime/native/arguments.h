// What callers of the C interface give, checked.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "session.h"

namespace framestep {

// Each throws Error(FS_ERROR_ARGUMENT) for a null where none may be, and for sizes that cannot be.

std::string text_or(const char* text, const char* otherwise);
SessionOptions options_of(const fs_session_options* given);  // null: the defaults
Frame frame_of(const fs_frame& given, size_t index);         // or FS_ERROR_FRAME
std::vector<NamedTensor> inputs_of(const fs_input* inputs, size_t count);
LabelInputs labels_of(const fs_labels* given, const Bundle& bundle, std::vector<std::string>& names);

}  // namespace framestep
