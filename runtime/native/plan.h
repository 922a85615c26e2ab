// What of a bundle a session runs.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "manifest.h"

namespace framestep {

struct Plan {
    std::vector<const Graph*> graphs;   // first those of a step, each after those that feed it, then those run by themselves
    size_t step_graphs = 0;
    std::vector<const State*> states;   // those that these graphs touch, in the manifest's order
    std::vector<const Port*> outputs;   // to be brought to the host
};

// What steps and runs need. `outputs` are names; without any, those that cost next to nothing are taken. `others` are graphs
// to be run by themselves. Throws Error: FS_ERROR_ARGUMENT for an unknown name, FS_ERROR_BUNDLE where frames cannot feed
// what is asked for.
Plan make_plan(const Bundle& bundle, const Manifest& manifest, const std::vector<std::string>& outputs,
               const std::vector<std::string>& others);

}  // namespace framestep
