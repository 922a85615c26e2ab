#include "labels.h"

#include <cstring>
#include <fstream>
#include <iterator>
#include <string_view>

namespace framestep {
namespace {

constexpr size_t MAX_HEADER = size_t{1} << 20;  // bytes

// One tensor of a safetensors file.
std::vector<float> read_rows(const Json& header, const char* name, std::string_view data, size_t count, size_t& hidden) {
    const Json* entry = header.find(name);
    if (entry == nullptr) throw Error(FS_ERROR_BUNDLE, "missing");
    const Json *dtype = entry->find("dtype"), *shape = entry->find("shape"), *places = entry->find("data_offsets");
    if (dtype == nullptr || shape == nullptr || places == nullptr || dtype->as_string() != "F32" ||
        shape->items().size() != 2 || places->items().size() != 2) {
        throw Error(FS_ERROR_BUNDLE, "entry");
    }
    const int64_t rows = shape->items()[0].as_int(), width = shape->items()[1].as_int();
    const int64_t begin = places->items()[0].as_int(), end = places->items()[1].as_int();
    const int64_t size = static_cast<int64_t>(data.size());
    if (rows != static_cast<int64_t>(count) || width < 1 || width > size || begin < 0 || end < begin || end > size ||
        (end - begin) / 4 / width != rows || (end - begin) % (4 * width) != 0) {
        throw Error(FS_ERROR_BUNDLE, "sizes");
    }
    std::vector<float> values(static_cast<size_t>(rows * width));
    std::memcpy(values.data(), data.data() + begin, values.size() * sizeof(float));
    hidden = static_cast<size_t>(width);
    return values;
}

}  // namespace

LabelInputs read_labels(const std::filesystem::path& path, size_t count, const Scoring& scoring) {
    std::ifstream file(path, std::ios::binary);
    const std::string content{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    LabelInputs labels;
    labels.count = count;
    labels.logit_scale = static_cast<float>(scoring.logit_scale);
    labels.logit_bias = static_cast<float>(scoring.logit_bias);
    try {
        uint64_t length = 0;
        if (content.size() < sizeof length) throw Error(FS_ERROR_BUNDLE, "length");
        std::memcpy(&length, content.data(), sizeof length);
        if (length > MAX_HEADER || length > content.size() - sizeof length) throw Error(FS_ERROR_BUNDLE, "length");
        const std::string_view rest = std::string_view(content).substr(sizeof length);
        const Json header = Json::parse(rest.substr(0, length));
        const std::string_view data = rest.substr(length);
        labels.text_embeddings = read_rows(header, "text_embeddings", data, count, labels.text_hidden);
        labels.patch_text_embeddings = read_rows(header, "patch_text_embeddings", data, count, labels.patch_text_hidden);
    } catch (const Error&) {
        throw Error(FS_ERROR_BUNDLE, path.string() + ": damaged; label the bundle again with 'framestep label'");
    }
    return labels;
}

}  // namespace framestep
