#include "onnx_files.h"

#include <set>

#include "file_io.h"
#include "json.h"
#include "protobuf.h"

// Only the few protobuf fields that can hold a tensor are followed; the field numbers are those of `onnx.proto`.

namespace framestep {
namespace {

enum class Message { none, model, training, function, graph, node, attribute, sparse_tensor, tensor, entry };

constexpr int MAX_DEPTH = 100;  // messages in messages, as protobuf's own readers have it

// The message in a field, `none` for a field that is not followed.
Message field_of(Message message, uint64_t number) {
    using M = Message;
    switch (message) {
        case M::model:
            return number == 7 ? M::graph : number == 20 ? M::training : number == 25 ? M::function : M::none;
        case M::training: return number == 1 || number == 2 ? M::graph : M::none;
        case M::function: return number == 7 ? M::node : number == 11 ? M::attribute : M::none;
        case M::graph:
            return number == 1 ? M::node : number == 5 ? M::tensor : number == 15 ? M::sparse_tensor : M::none;
        case M::node: return number == 5 ? M::attribute : M::none;
        case M::attribute:
            if (number == 5 || number == 10) return M::tensor;
            if (number == 6 || number == 11) return M::graph;
            return number == 22 || number == 23 ? M::sparse_tensor : M::none;
        case M::sparse_tensor: return number == 1 || number == 2 ? M::tensor : M::none;
        case M::tensor: return number == 13 ? M::entry : M::none;
        case M::entry:
        case M::none: break;
    }
    return M::none;
}

void collect(std::string_view content, Message message, int depth, std::set<std::string>& locations) {
    if (depth > MAX_DEPTH) throw ProtobufDamaged();
    ProtobufFields fields(content);
    ProtobufField field;
    if (message == Message::entry) {
        std::string_view key, location;
        while (fields.next(field)) {
            if (!field.is_message) continue;
            if (!is_utf8(field.content)) throw ProtobufDamaged();
            if (field.number == 1) key = field.content;
            if (field.number == 2) location = field.content;
        }
        if (key == "location") locations.emplace(location);
        return;
    }
    while (fields.next(field)) {
        const Message inner = field.is_message ? field_of(message, field.number) : Message::none;
        if (inner != Message::none) collect(field.content, inner, depth + 1, locations);
    }
}

}  // namespace

std::vector<std::string> external_files(const std::filesystem::path& path) {
    const std::string content = InputFile(path, FS_ERROR_BUNDLE).read_all();
    std::set<std::string> locations;
    try {
        collect(content, Message::model, 1, locations);
    } catch (const ProtobufDamaged&) {
        throw Error(FS_ERROR_BUNDLE, path.string() + ": damaged, or not an ONNX graph");
    }
    return {locations.begin(), locations.end()};
}

}  // namespace framestep
