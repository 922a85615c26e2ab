// The fields of a protobuf message (https://protobuf.dev/programming-guides/encoding), read and written.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace framestep {

struct ProtobufDamaged {};

// Takes an integer off the front of a text. Throws ProtobufDamaged.
inline uint64_t take_varint(std::string_view& left) {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        if (left.empty()) break;
        const auto byte = static_cast<uint8_t>(left[0]);
        left.remove_prefix(1);
        if (shift == 63 && byte > 1) break;
        value |= uint64_t{byte & 0x7Fu} << shift;
        if (byte < 0x80) return value;
    }
    throw ProtobufDamaged();
}

struct ProtobufField {
    uint64_t number = 0;
    bool is_message = false;   // or text, or bytes: it has `content`
    std::string_view content;
    uint64_t integer = 0;      // of a varint
    std::string_view raw;      // the whole field
};

class ProtobufFields {
public:
    explicit ProtobufFields(std::string_view message) : left_(message) {}

    // False at the end. Throws ProtobufDamaged.
    bool next(ProtobufField& field) {
        if (left_.empty()) return false;
        const std::string_view from = left_;
        const uint64_t key = take_varint(left_);
        field = {};
        field.number = key >> 3;
        switch (key & 7) {
            case 0: field.integer = take_varint(left_); break;
            case 1: take(8); break;
            case 2:
                field.is_message = true;
                field.content = take(take_varint(left_));
                break;
            case 5: take(4); break;
            default: throw ProtobufDamaged();
        }
        field.raw = from.substr(0, from.size() - left_.size());
        return true;
    }

private:
    std::string_view take(uint64_t size) {
        if (size > left_.size()) throw ProtobufDamaged();
        const std::string_view taken = left_.substr(0, size);
        left_.remove_prefix(size);
        return taken;
    }

    std::string_view left_;
};

inline void put_varint(std::string& out, uint64_t value) {
    for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
    out += static_cast<char>(value);
}

inline void put_message(std::string& out, uint64_t number, std::string_view content) {
    put_varint(out, number << 3 | 2);
    put_varint(out, content.size());
    out += content;
}

inline void put_integer(std::string& out, uint64_t number, uint64_t value) {
    put_varint(out, number << 3);
    put_varint(out, value);
}

}  // namespace framestep
