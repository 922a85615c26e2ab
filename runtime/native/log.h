// Messages to whoever runs this.
#pragma once

#include <string>

#include "framestep.h"

namespace framestep {

void log_to(fs_log_callback callback, void* user);
void log(fs_log_level level, const std::string& message) noexcept;

}  // namespace framestep
