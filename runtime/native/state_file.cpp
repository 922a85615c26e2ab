#include "state_file.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <memory>
#include <optional>

#include "file_io.h"
#include "finite.h"
#include "json.h"

namespace framestep {
namespace {

constexpr uint64_t MAX_HEADER = 1 << 20;  // bytes
constexpr int64_t MAX_POSITION = int64_t{1} << 62;
constexpr char METADATA[] = "__metadata__";
constexpr char FORMAT[] = "framestep-state";

struct Dtype {
    const char* name;
    const char* code;
    size_t bytes;
};

constexpr Dtype DTYPES[] = {{"float32", "F32", 4}, {"float16", "F16", 2}, {"int8", "I8", 1}};

const Dtype* dtype_of(const std::string& text, const char* Dtype::*member) {
    for (const Dtype& dtype : DTYPES) {
        if (text == dtype.*member) return &dtype;
    }
    return nullptr;
}

// A tensor that a header describes; it takes the bytes begin..end of the data.
struct Entry {
    std::string name;
    const Dtype* dtype;
    std::vector<int64_t> shape;
    uint64_t begin, end;
};

struct Header {
    const Json* metadata = nullptr;
    std::vector<Entry> entries;  // sorted by place; they fill the data without a gap
    uint64_t bytes = 0;          // of all data
};

// Nothing where a header is not one: the caller says what then.
std::optional<Entry> read_entry(const Json::Member& member) {
    const Json *dtype = member.value.find("dtype"), *shape = member.value.find("shape"),
               *places = member.value.find("data_offsets");
    if (!dtype || !shape || !places || member.value.members().size() != 3 || places->items().size() != 2) return {};
    Entry entry;
    entry.name = member.name;
    entry.dtype = dtype_of(dtype->as_string(), &Dtype::code);
    if (!entry.dtype) return {};
    uint64_t size = entry.dtype->bytes;
    for (const Json& extent : shape->items()) {
        entry.shape.push_back(extent.as_int());
        if (entry.shape.back() < 0 || __builtin_mul_overflow(size, static_cast<uint64_t>(entry.shape.back()), &size))
            return {};
    }
    const int64_t begin = places->items()[0].as_int(), end = places->items()[1].as_int();
    if (begin < 0 || end < begin || static_cast<uint64_t>(end - begin) != size) return {};
    entry.begin = static_cast<uint64_t>(begin), entry.end = static_cast<uint64_t>(end);
    return entry;
}

std::optional<Header> read_header(const Json& json) {
    Header header;
    for (const Json::Member& member : json.members()) {
        if (member.name == METADATA) {
            header.metadata = &member.value;
            continue;
        }
        std::optional<Entry> entry = read_entry(member);
        if (!entry) return {};
        header.entries.push_back(std::move(*entry));
    }
    std::stable_sort(header.entries.begin(), header.entries.end(), [](const Entry& a, const Entry& b) {
        return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
    });
    for (const Entry& entry : header.entries) {
        if (entry.begin != header.bytes) return {};
        header.bytes = entry.end;
    }
    return header;
}

// The header's text, empty where there is none. What follows in the file is data.
std::string read_header_text(InputFile& file) {
    uint8_t prefix[8];
    if (file.read(prefix, sizeof prefix) != sizeof prefix) return {};
    uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | prefix[i];
    if (length > MAX_HEADER) return {};
    std::string text(length, '\0');
    if (file.read(text.data(), text.size()) != text.size()) return {};
    return text;
}

bool is_finite(const Dtype& dtype, const uint8_t* data, size_t bytes) {
    if (dtype.bytes == 4) return all_finite(data, bytes, FLOAT32_EXPONENT);
    if (dtype.bytes == 2) return all_finite(data, bytes, FLOAT16_EXPONENT);
    return true;
}

struct StateHeader {
    std::string state_key;
    int64_t position = 0;
    std::vector<Entry> entries;
};

std::optional<StateHeader> read_state_header(const std::string& text) try {
    const Json json = Json::parse(text);
    std::optional<Header> header = read_header(json);
    if (!header || !header->metadata) return {};
    const Json *format = header->metadata->find("format"), *key = header->metadata->find("state_key"),
               *position = header->metadata->find("position");
    if (!format || format->as_string() != FORMAT || !key || !position) return {};
    StateHeader state{key->as_string(), 0, std::move(header->entries)};
    const std::string& digits = position->as_string();
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), state.position);
    if (error != std::errc() || end != digits.data() + digits.size()) return {};
    return state;
} catch (const Error&) {  // not JSON, or a value of another kind
    return {};
}

}  // namespace

void write_state(const std::filesystem::path& path, const std::string& state_key, int64_t position,
                 const std::vector<TensorView>& tensors) {
    Json::Object members = {{METADATA, Json(Json::Object{{"format", Json(FORMAT)},
                                                         {"position", Json(std::to_string(position))},
                                                         {"state_key", Json(state_key)}})}};
    int64_t offset = 0;
    std::vector<std::string_view> pieces(1);
    for (const TensorView& tensor : tensors) {
        const Dtype* dtype = dtype_of(tensor.dtype, &Dtype::name);
        if (!dtype) throw Error(FS_ERROR_OUTPUT, path.string() + ": a state cannot hold " + tensor.dtype);
        const int64_t end = offset + static_cast<int64_t>(tensor.bytes);
        Json::Array shape;
        for (const int64_t extent : tensor.shape) shape.emplace_back(extent);
        members.push_back(
            {tensor.name, Json(Json::Object{{"dtype", Json(dtype->code)},
                                            {"shape", Json(std::move(shape))},
                                            {"data_offsets", Json(Json::Array{Json(offset), Json(end)})}})});
        pieces.emplace_back(static_cast<const char*>(tensor.data), tensor.bytes);
        offset = end;
    }
    std::string text = dump_sorted(Json(std::move(members)));
    text.append((8 - text.size() % 8) % 8, ' ');
    std::string head;
    for (int shift = 0; shift < 64; shift += 8) head += static_cast<char>(uint64_t{text.size()} >> shift);
    head += text;
    pieces[0] = head;
    write_file(path, pieces);
}

int64_t read_state(const std::filesystem::path& path, const std::string& state_key,
                   const std::vector<TensorView>& into) {
    auto fail = [&](const std::string& what) -> Error { return {FS_ERROR_STATE, path.string() + ": " + what}; };
    InputFile file(path, FS_ERROR_STATE);
    const std::optional<StateHeader> header = read_state_header(read_header_text(file));
    if (!header) throw fail("damaged, or not a framestep state file");
    if (header->state_key != state_key) {
        throw fail("was saved by another model, precision or window (state key " + header->state_key.substr(0, 12) +
                   "…, expected " + state_key.substr(0, 12) + "…)");
    }
    if (header->position < 0 || header->position > MAX_POSITION) {
        throw fail("damaged, its position is " + std::to_string(header->position));
    }

    uint64_t total = 0;
    for (const TensorView& tensor : into) {
        const auto entry = std::find_if(header->entries.begin(), header->entries.end(),
                                        [&](const Entry& one) { return one.name == tensor.name; });
        if (entry == header->entries.end() || tensor.dtype != entry->dtype->name || entry->shape != tensor.shape ||
            entry->begin != total || entry->end - entry->begin != tensor.bytes) {
            throw fail("damaged at '" + tensor.name + "'");
        }
        total = entry->end;
    }
    if (header->entries.size() != into.size()) throw fail("damaged, it has tensors that the model does not have");
    std::unique_ptr<uint8_t[]> data(new uint8_t[total + 1]);  // one more, to see that there is none
    if (file.read(data.get(), total + 1) != total) {
        throw fail("damaged or truncated, expected " + std::to_string(total) + " bytes of tensors");
    }
    for (const Entry& entry : header->entries) {
        if (!is_finite(*entry.dtype, data.get() + entry.begin, entry.end - entry.begin)) {
            throw fail("damaged at '" + entry.name + "': it has numbers that are not finite");
        }
    }
    const uint8_t* from = data.get();
    for (const TensorView& tensor : into) {
        if (tensor.bytes > 0) std::memcpy(tensor.data, from, tensor.bytes);
        from += tensor.bytes;
    }
    return header->position;
}

std::vector<Tensor> read_safetensors(const std::filesystem::path& path) {
    InputFile file(path, FS_ERROR_BUNDLE);
    auto fail = [&]() -> Error {
        return {FS_ERROR_BUNDLE, path.string() + ": damaged; label the bundle again with 'framestep label'"};
    };
    const std::string text = read_header_text(file), data = file.read_all();
    std::optional<Json> json;
    std::optional<Header> header;
    try {
        json = Json::parse(text);
        header = read_header(*json);
    } catch (const Error&) {
        throw fail();
    }
    if (!header || header->bytes != data.size()) throw fail();
    std::vector<Tensor> tensors;
    for (Entry& entry : header->entries) {
        const auto first = data.begin() + static_cast<int64_t>(entry.begin),
                   last = data.begin() + static_cast<int64_t>(entry.end);
        tensors.push_back({std::move(entry.name), entry.dtype->name, std::move(entry.shape), {first, last}});
    }
    return tensors;
}

}  // namespace framestep
