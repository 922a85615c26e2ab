#include "arguments.h"

#include <optional>

#include "structs.h"

namespace framestep {
namespace {

constexpr int32_t MAX_SIDE = 1 << 14;  // pixels

}  // namespace

std::string text_or(const char* text, const char* otherwise) { return text == nullptr ? otherwise : text; }

SessionOptions options_of(const fs_session_options* given) {
    SessionOptions options;
    if (given == nullptr) return options;
    const auto known = read_struct<fs_session_options>(given, "options");
    options.engine = text_or(known.engine, "auto");
    options.device = text_or(known.device, "auto");
    options.precision = text_or(known.precision, "auto");
    options.library = text_or(known.library, "");
    options.streams = known.streams == 0 ? 1 : known.streams;
    options.threads = known.threads;
    options.trust_files = known.trust_files != 0;
    options.manifest = text_or(known.manifest, "");
    if (known.output_count != 0) need(known.outputs, "options.outputs");
    for (size_t index = 0; index < known.output_count; ++index) {
        need(known.outputs[index], "options.outputs");
        options.outputs.emplace_back(known.outputs[index]);
    }
    if (known.graph_count != 0) need(known.graphs, "options.graphs");
    for (size_t index = 0; index < known.graph_count; ++index) {
        need(known.graphs[index], "options.graphs");
        options.graphs.emplace_back(known.graphs[index]);
    }
    return options;
}

Frame frame_of(const fs_frame& given, size_t index) {
    const auto refused = [&](fs_status status, const std::string& why) {
        return Error(status, "frames[" + std::to_string(index) + "]: " + why);
    };
    if (given.data == nullptr) throw refused(FS_ERROR_ARGUMENT, "data is null");
    Frame frame{};
    frame.stream = given.stream;
    const int format = number_of(given.format);
    switch (format) {
        case FS_RGB: frame.picture.format = PixelFormat::rgb; break;
        case FS_BGR: frame.picture.format = PixelFormat::bgr; break;
        case FS_GREY: frame.picture.format = PixelFormat::grey; break;
        default: throw refused(FS_ERROR_FRAME, "the format " + std::to_string(format) + " is unknown");
    }
    if (given.width < 1 || given.width > MAX_SIDE || given.height < 1 || given.height > MAX_SIDE) {
        throw refused(FS_ERROR_FRAME, "expected 1 to " + std::to_string(MAX_SIDE) + " pixels a side, found " +
                                          std::to_string(given.width) + " by " + std::to_string(given.height));
    }
    const int64_t row = int64_t{given.width} * (format == FS_GREY ? 1 : 3);
    constexpr int64_t MAX_STRIDE = int64_t{1} << 32;
    const int64_t stride = given.stride == 0 ? row : given.stride;
    if (stride > MAX_STRIDE || stride < row) {
        throw refused(FS_ERROR_FRAME, "a stride of " + std::to_string(given.stride) + " bytes; expected 0, or at least " +
                                          std::to_string(row) + " for its width");
    }
    frame.picture.data = given.data;
    frame.picture.width = given.width;
    frame.picture.height = given.height;
    frame.picture.stride = stride;
    return frame;
}

std::vector<NamedTensor> inputs_of(const fs_input* inputs, size_t count) {
    constexpr size_t MAX_INPUTS = 256;
    if (count > MAX_INPUTS) throw Error(FS_ERROR_ARGUMENT, "inputs: " + std::to_string(count) + " are too many");
    if (count != 0) need(inputs, "inputs");
    std::vector<NamedTensor> named;
    const size_t size = count != 0 ? inputs->struct_size : 0;
    if (count != 0) check_size(size, sizeof(fs_input), "inputs");
    const auto* place = reinterpret_cast<const unsigned char*>(inputs);
    for (size_t index = 0; index < count; ++index) {
        const auto given = read_struct<fs_input>(place + index * size, "inputs");
        if (given.struct_size != size) throw Error(FS_ERROR_ARGUMENT, "inputs: structs of different sizes");
        need(given.name, "inputs");
        need(given.data, given.name);
        if (given.rank < 0 || given.rank > FS_MAX_RANK) {
            throw Error(FS_ERROR_ARGUMENT, std::string(given.name) + ": a rank of " + std::to_string(given.rank));
        }
        const int dtype = number_of(given.dtype);
        if (dtype < FS_UINT8 || dtype > FS_FLOAT32) {
            throw Error(FS_ERROR_ARGUMENT, std::string(given.name) + ": the dtype " + std::to_string(dtype) + " is unknown");
        }
        named.push_back({given.name, given.dtype, {given.data, {given.shape, given.shape + given.rank}}});
    }
    return named;
}

LabelInputs labels_of(const fs_labels* given, const Bundle& bundle, std::vector<std::string>& names) {
    const auto known = read_struct<fs_labels>(given, "labels");
    if (known.count == 0) throw Error(FS_ERROR_ARGUMENT, "labels: expected at least one");
    need(known.text_embeddings, "labels.text_embeddings");
    need(known.patch_text_embeddings, "labels.patch_text_embeddings");
    const std::optional<Scoring>& scoring = bundle.scoring;
    if ((known.logit_scale == nullptr || known.logit_bias == nullptr) && !scoring) {
        throw Error(FS_ERROR_BUNDLE, bundle.path.string() + ": has no scoring; give labels.logit_scale and labels.logit_bias");
    }
    constexpr size_t MAX_LABELS = size_t{1} << 20, MAX_HIDDEN = size_t{1} << 16;
    if (known.count > MAX_LABELS || known.text_hidden - 1 >= MAX_HIDDEN || known.patch_text_hidden - 1 >= MAX_HIDDEN) {
        throw Error(FS_ERROR_ARGUMENT, "labels: sizes that are not possible");
    }
    LabelInputs labels;
    labels.count = known.count;
    labels.text_hidden = known.text_hidden;
    labels.patch_text_hidden = known.patch_text_hidden;
    labels.text_embeddings.assign(known.text_embeddings, known.text_embeddings + known.count * known.text_hidden);
    labels.patch_text_embeddings.assign(known.patch_text_embeddings,
                                        known.patch_text_embeddings + known.count * known.patch_text_hidden);
    labels.logit_scale = known.logit_scale != nullptr ? *known.logit_scale : static_cast<float>(scoring->logit_scale);
    labels.logit_bias = known.logit_bias != nullptr ? *known.logit_bias : static_cast<float>(scoring->logit_bias);
    names.assign(known.count, "");
    for (size_t index = 0; known.names != nullptr && index < known.count; ++index) {
        need(known.names[index], "labels.names");
        names[index] = known.names[index];
    }
    return labels;
}

}  // namespace framestep
