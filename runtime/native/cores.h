// How many threads a session has where nobody says it; `runtime/cores.py` is the same for Python.
#pragma once

#include <string>
#include <vector>

namespace framestep {

// Numbers of the processors that this process may use; hyperthreads count.
std::vector<int> usable_processors();

// Cores behind these processors, but no more than the process's control groups give the time of. Hyperthreads share the
// arithmetic of their core. Threads beyond a group's quota (`docker run --cpus`, a limit in Kubernetes) would use it up early
// in each period, and then all of them stand still for the rest of it. `root` is that of the file systems /sys and /proc.
int default_threads(const std::vector<int>& processors, const std::string& root = "");

}  // namespace framestep
