// The label embeddings of a bundle: a safetensors file with `text_embeddings` and `patch_text_embeddings`, float32
// [labels, hidden].
#pragma once

#include <filesystem>

#include "engine.h"

namespace framestep {

// The embeddings of `count` labels. Throws Error(FS_ERROR_BUNDLE): damaged, or not one row a label.
LabelInputs read_labels(const std::filesystem::path& path, size_t count, const Scoring& scoring);

// Throws Error(FS_ERROR_ARGUMENT) where a step's graphs take labels in another shape.
void check_labels(const Plan& plan, const LabelInputs& labels);

}  // namespace framestep
