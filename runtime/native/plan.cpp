#include "plan.h"

#include <algorithm>
#include <set>

namespace framestep {
namespace {

const std::set<std::string> LABEL_ROLES = {"text_embeddings", "patch_text_embeddings", "logit_scale", "logit_bias"};
const std::set<std::string> FED_ROLES = {"frame", "position", "output"};

// Outputs that come from frames, and whether they need labels.
std::vector<std::pair<const Port*, bool>> available_outputs(const Manifest& manifest) {
    std::vector<std::pair<const Port*, bool>> found;
    for (const Graph& graph : manifest.graphs) {
        bool fed = true, labelled = false, of_streams = false;
        for (const Port& port : graph.inputs) {
            const bool label = LABEL_ROLES.count(port.role) != 0;
            labelled |= label;
            of_streams |= FED_ROLES.count(port.role) != 0;
            fed &= label || FED_ROLES.count(port.role) != 0;
        }
        if (!fed || !of_streams) continue;
        for (const Port& port : graph.outputs) found.emplace_back(&port, labelled);
    }
    return found;
}

std::vector<std::string> default_outputs(const Manifest& manifest, bool labelled) {
    std::vector<std::string> names;
    // of the scores only those of whole frames, [S, C], which cost next to nothing
    for (const auto& [port, needs_labels] : available_outputs(manifest)) {
        if (!needs_labels || (labelled && port->shape.size() == 2)) names.push_back(port->name);
    }
    return names;
}

void check_outputs(const std::vector<std::string>& outputs, const Manifest& manifest) {
    const auto available = available_outputs(manifest);
    std::string known;
    for (const auto& item : available) known += (known.empty() ? "" : ", ") + item.first->name;
    for (const std::string& name : outputs) {
        const auto found = std::find_if(available.begin(), available.end(),
                                        [&](const auto& item) { return item.first->name == name; });
        if (found == available.end()) {
            throw Error(FS_ERROR_ARGUMENT, "outputs: '" + name + "' is unknown; this bundle has " + known);
        }
        if (std::count(outputs.begin(), outputs.end(), name) > 1) {
            throw Error(FS_ERROR_ARGUMENT, "outputs: '" + name + "' stands twice");
        }
    }
}

Plan plan_of(const Bundle& bundle, const Manifest& manifest, const std::vector<std::string>& outputs,
             const std::vector<std::string>& others) {
    if (outputs.empty() && others.empty()) {
        throw Error(FS_ERROR_BUNDLE, bundle.path.string() + ": has no output that frames give");
    }
    Plan plan;
    plan.graphs = graphs_for(manifest, outputs);
    plan.step_graphs = plan.graphs.size();
    for (const std::string& name : others) {
        const auto found = std::find_if(manifest.graphs.begin(), manifest.graphs.end(),
                                        [&](const Graph& graph) { return graph.name == name; });
        if (found == manifest.graphs.end()) {
            std::string known;
            for (const Graph& graph : manifest.graphs) known += (known.empty() ? "" : ", ") + graph.name;
            throw Error(FS_ERROR_ARGUMENT, "graphs: '" + name + "' is unknown; this bundle has " + known);
        }
        if (std::find(plan.graphs.begin(), plan.graphs.end(), &*found) == plan.graphs.end()) plan.graphs.push_back(&*found);
    }
    for (const State& state : manifest.states) {
        for (const Graph* graph : plan.graphs) {
            const bool used = std::any_of(graph->states.begin(), graph->states.end(),
                                          [&](const StateUse& use) { return use.state == state.name; });
            if (used) {
                plan.states.push_back(&state);
                break;
            }
        }
    }
    for (const std::string& name : outputs) {
        for (const Graph* graph : plan.graphs) {
            for (const Port& port : graph->outputs) {
                if (port.name == name) plan.outputs.push_back(&port);
            }
        }
    }
    return plan;
}

// What only a frame graph's input can say: that it takes frames of the bundle's size.
void check_frame_ports(const Plan& plan, const Bundle& bundle) {
    const std::vector<Dim> frame = {{0, 'S'}, {bundle.height, 0}, {bundle.width, 0}, {3, 0}};
    const std::vector<Dim> position = {{0, 'S'}};
    for (size_t index = 0; index < plan.step_graphs; ++index) {
        const Graph* graph = plan.graphs[index];
        for (const Port& port : graph->inputs) {
            const bool fits = port.role == "frame"      ? port.shape == frame && port.dtype == FS_UINT8
                              : port.role == "position" ? port.shape == position && port.dtype == FS_INT64
                                                        : FED_ROLES.count(port.role) + LABEL_ROLES.count(port.role) > 0;
            if (!fits) {
                throw Error(FS_ERROR_BUNDLE, (bundle.path / graph->file).string() + ": input '" + port.name +
                                                 "' is not one that frames and labels can feed");
            }
        }
    }
}

}  // namespace

Plan make_plan(const Bundle& bundle, const Manifest& manifest, const std::vector<std::string>& outputs,
               const std::vector<std::string>& others) {
    const std::vector<std::string> taken = outputs.empty() ? default_outputs(manifest, bundle.labels.has_value()) : outputs;
    check_outputs(taken, manifest);
    Plan plan = plan_of(bundle, manifest, taken, others);
    check_frame_ports(plan, bundle);
    return plan;
}

}  // namespace framestep
