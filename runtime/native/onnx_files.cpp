#include "onnx_files.h"

#include <set>

#include "file_io.h"
#include "json.h"

// Only the few protobuf fields that can hold a tensor are followed; the wire format is that of
// https://protobuf.dev/programming-guides/encoding and the field numbers are those of `onnx.proto`.

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

struct Damaged {};

class Fields {
public:
    explicit Fields(std::string_view message) : left_(message) {}

    // The next length-delimited field; false at the end.
    bool next(uint64_t& number, std::string_view& content) {
        while (!left_.empty()) {
            const uint64_t key = varint();
            switch (key & 7) {
                case 0: varint(); break;
                case 1: take(8); break;
                case 2:
                    number = key >> 3;
                    content = take(varint());
                    return true;
                case 5: take(4); break;
                default: throw Damaged();
            }
        }
        return false;
    }

private:
    std::string_view take(uint64_t size) {
        if (size > left_.size()) throw Damaged();
        const std::string_view taken = left_.substr(0, size);
        left_.remove_prefix(size);
        return taken;
    }

    uint64_t varint() {
        uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            const auto byte = static_cast<uint8_t>(take(1)[0]);
            if (shift == 63 && byte > 1) break;
            value |= uint64_t{byte & 0x7Fu} << shift;
            if (byte < 0x80) return value;
        }
        throw Damaged();
    }

    std::string_view left_;
};

void collect(std::string_view content, Message message, int depth, std::set<std::string>& locations) {
    if (depth > MAX_DEPTH) throw Damaged();
    Fields fields(content);
    uint64_t number = 0;
    std::string_view value;
    if (message == Message::entry) {
        std::string_view key, location;
        while (fields.next(number, value)) {
            if (!is_utf8(value)) throw Damaged();
            if (number == 1) key = value;
            if (number == 2) location = value;
        }
        if (key == "location") locations.emplace(location);
        return;
    }
    while (fields.next(number, value)) {
        const Message field = field_of(message, number);
        if (field != Message::none) collect(value, field, depth + 1, locations);
    }
}

}  // namespace

std::vector<std::string> external_files(const std::filesystem::path& path) {
    const std::string content = InputFile(path, FS_ERROR_BUNDLE).read_all();
    std::set<std::string> locations;
    try {
        collect(content, Message::model, 1, locations);
    } catch (const Damaged&) {
        throw Error(FS_ERROR_BUNDLE, path.string() + ": damaged, or not an ONNX graph");
    }
    return {locations.begin(), locations.end()};
}

}  // namespace framestep
