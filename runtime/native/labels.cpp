#include "labels.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "state_file.h"

namespace framestep {
namespace {

// The rows of one tensor. Throws where it is not float32 [count, hidden].
std::vector<float> rows_of(const std::vector<Tensor>& tensors, const char* name, size_t count, size_t& hidden) {
    const auto found =
        std::find_if(tensors.begin(), tensors.end(), [&](const Tensor& tensor) { return tensor.name == name; });
    if (found == tensors.end() || found->dtype != "float32" || found->shape.size() != 2 || found->shape[1] < 1 ||
        found->shape[0] != static_cast<int64_t>(count)) {
        throw Error(FS_ERROR_BUNDLE, name);
    }
    std::vector<float> values(found->data.size() / sizeof(float));
    std::memcpy(values.data(), found->data.data(), values.size() * sizeof(float));
    hidden = static_cast<size_t>(found->shape[1]);
    return values;
}

}  // namespace

LabelInputs read_labels(const std::filesystem::path& path, size_t count, const Scoring& scoring) {
    LabelInputs labels;
    labels.count = count;
    labels.logit_scale = static_cast<float>(scoring.logit_scale);
    labels.logit_bias = static_cast<float>(scoring.logit_bias);
    try {
        const std::vector<Tensor> tensors = read_safetensors(path);
        labels.text_embeddings = rows_of(tensors, "text_embeddings", count, labels.text_hidden);
        labels.patch_text_embeddings = rows_of(tensors, "patch_text_embeddings", count, labels.patch_text_hidden);
    } catch (const Error&) {
        std::error_code unknown;
        if (!std::filesystem::exists(path, unknown) && !unknown) {
            throw Error(FS_ERROR_BUNDLE,
                        path.string() + ": missing; if the bundle was labelled anew meanwhile, open it again");
        }
        throw Error(FS_ERROR_BUNDLE, path.string() + ": damaged; label the bundle again with 'framestep label'");
    }
    return labels;
}

void check_labels(const Plan& plan, const LabelInputs& labels) {
    const auto count = static_cast<int64_t>(labels.count);
    const std::map<std::string, std::vector<int64_t>> shapes = {
        {"text_embeddings", {count, static_cast<int64_t>(labels.text_hidden)}},
        {"patch_text_embeddings", {count, static_cast<int64_t>(labels.patch_text_hidden)}},
        {"logit_scale", {}},
        {"logit_bias", {}}};
    for (size_t index = 0; index < plan.step_graphs; ++index) {
        for (const Port& port : plan.graphs[index]->inputs) {
            const auto given = shapes.find(port.role);
            if (given == shapes.end()) continue;
            const std::vector<int64_t>& shape = given->second;
            bool fits = port.dtype == FS_FLOAT32 && port.shape.size() == shape.size();
            std::string expected, found;
            for (size_t axis = 0; axis < port.shape.size(); ++axis) {
                const bool any = port.shape[axis].symbol == 'C' && axis == 0;
                fits = fits && (any || port.shape[axis].size == shape[axis]);
                expected += (axis == 0 ? "" : ", ") + (any ? "labels" : std::to_string(port.shape[axis].size));
            }
            if (fits) continue;
            for (const int64_t size : shape) found += (found.empty() ? "" : ", ") + std::to_string(size);
            throw Error(FS_ERROR_ARGUMENT, "labels: graph '" + plan.graphs[index]->name + "' takes '" + port.name + "' as " +
                                               name_of(port.dtype) + " [" + expected + "], found float32 [" + found + "]");
        }
    }
}

}  // namespace framestep
