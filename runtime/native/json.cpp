#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <unordered_set>

#include "error.h"

namespace framestep {
namespace {

// Length of the UTF-8 sequence that `bytes` begins with; 0 if it is none.
size_t utf8_length(std::string_view bytes) {
    auto byte = [&](size_t i) { return i < bytes.size() ? static_cast<uint8_t>(bytes[i]) : 0; };
    auto follows = [&](size_t i) { return (byte(i) & 0xC0) == 0x80; };
    const unsigned first = byte(0);
    if (bytes.empty()) return 0;
    if (first < 0x80) return 1;
    if (first < 0xC2) return 0;
    if (first < 0xE0) return follows(1) ? 2 : 0;
    if (first < 0xF0) {
        const bool overlong = first == 0xE0 && byte(1) < 0xA0, surrogate = first == 0xED && byte(1) >= 0xA0;
        return follows(1) && follows(2) && !overlong && !surrogate ? 3 : 0;
    }
    const bool overlong = first == 0xF0 && byte(1) < 0x90;
    const bool beyond = first > 0xF4 || (first == 0xF4 && byte(1) >= 0x90);
    return follows(1) && follows(2) && follows(3) && !overlong && !beyond ? 4 : 0;
}

void append_utf8(std::string& out, uint32_t point) {
    if (point < 0x80) {
        out += static_cast<char>(point);
    } else if (point < 0x800) {
        out += static_cast<char>(0xC0 | point >> 6);
        out += static_cast<char>(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
        out += static_cast<char>(0xE0 | point >> 12);
        out += static_cast<char>(0x80 | (point >> 6 & 0x3F));
        out += static_cast<char>(0x80 | (point & 0x3F));
    } else {
        out += static_cast<char>(0xF0 | point >> 18);
        out += static_cast<char>(0x80 | (point >> 12 & 0x3F));
        out += static_cast<char>(0x80 | (point >> 6 & 0x3F));
        out += static_cast<char>(0x80 | (point & 0x3F));
    }
}

class Parser {
public:
    Parser(std::string_view text, size_t max_depth) : text_(text), max_depth_(max_depth) {}

    Json document() {
        skip_space();
        Json value = any_value(0);
        skip_space();
        if (at_ != text_.size()) fail("the end");
        return value;
    }

private:
    [[noreturn]] void fail(const std::string& expected) const { fail_at(at_, expected, found()); }

    [[noreturn]] static void fail_at(size_t at, const std::string& expected, const std::string& found) {
        throw Error(FS_ERROR_BUNDLE, "byte " + std::to_string(at) + ": expected " + expected + ", found " + found);
    }

    std::string found() const {
        if (at_ >= text_.size()) return "the end";
        const char c = text_[at_];
        if (c >= ' ' && c <= '~') return std::string("'") + c + "'";
        const char* digits = "0123456789abcdef";
        return std::string("byte 0x") + digits[static_cast<uint8_t>(c) >> 4] + digits[c & 15];
    }

    // the next character, 0 at the end (a zero byte in the text is refused wherever it stands)
    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    bool is_digit() const { return peek() >= '0' && peek() <= '9'; }

    bool take(char c) {
        if (at_ >= text_.size() || text_[at_] != c) return false;
        ++at_;
        return true;
    }

    void skip_space() {
        while (at_ < text_.size() && (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r')) ++at_;
    }

    Json any_value(size_t depth) {
        switch (peek()) {
            case '{': return object(depth);
            case '[': return array(depth);
            case '"': return Json(string());
            case 't': return word("true", Json(true));
            case 'f': return word("false", Json(false));
            case 'n': return word("null", Json());
            default: break;
        }
        if (peek() == '-' || is_digit()) return number();
        fail("a value");
    }

    Json word(std::string_view name, Json value) {
        if (text_.substr(at_, name.size()) != name) fail(std::string(name));
        at_ += name.size();
        return value;
    }

    void check_depth(size_t depth) const {
        if (depth >= max_depth_) fail("at most " + std::to_string(max_depth_) + " levels");
    }

    Json array(size_t depth) {
        check_depth(depth);
        ++at_;
        Json::Array items;
        skip_space();
        if (take(']')) return Json(std::move(items));
        while (true) {
            skip_space();
            items.push_back(any_value(depth + 1));
            skip_space();
            if (take(']')) return Json(std::move(items));
            if (!take(',')) fail("',' or ']'");
        }
    }

    Json object(size_t depth) {
        check_depth(depth);
        ++at_;
        Json::Object members;
        std::unordered_set<std::string> names;
        skip_space();
        if (take('}')) return Json(std::move(members));
        while (true) {
            skip_space();
            if (peek() != '"') fail("a name in quotes");
            const size_t begin = at_;
            std::string name = string();
            if (!names.insert(name).second) fail_at(begin, "a new name", "one that this object has already");
            skip_space();
            if (!take(':')) fail("':'");
            skip_space();
            members.push_back({std::move(name), any_value(depth + 1)});
            skip_space();
            if (take('}')) return Json(std::move(members));
            if (!take(',')) fail("',' or '}'");
        }
    }

    std::string string() {
        ++at_;
        std::string out;
        while (!take('"')) {
            if (at_ < text_.size() && static_cast<uint8_t>(text_[at_]) < 0x20)
                fail("an escape for a control character");
            if (take('\\')) {
                escape(out);
                continue;
            }
            const size_t length = utf8_length(text_.substr(at_));
            if (length == 0) fail(at_ < text_.size() ? "UTF-8" : "'\"'");
            out.append(text_.substr(at_, length));
            at_ += length;
        }
        return out;
    }

    void escape(std::string& out) {
        const size_t begin = at_ - 1;
        switch (peek()) {
            case '"': out += '"'; break;
            case '\\': out += '\\'; break;
            case '/': out += '/'; break;
            case 'b': out += '\b'; break;
            case 'f': out += '\f'; break;
            case 'n': out += '\n'; break;
            case 'r': out += '\r'; break;
            case 't': out += '\t'; break;
            case 'u': {
                ++at_;
                uint32_t point = four_hex_digits();
                if (point >= 0xD800 && point < 0xE000) {
                    const bool pair = point < 0xDC00 && text_.substr(at_, 2) == "\\u";
                    if (!pair) fail_at(begin, "a surrogate pair", "half of one");
                    at_ += 2;
                    const uint32_t low = four_hex_digits();
                    if (low < 0xDC00 || low >= 0xE000) fail_at(begin, "a surrogate pair", "half of one");
                    point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
                }
                append_utf8(out, point);
                return;
            }
            default: fail("one of \"\\/bfnrtu after a backslash");
        }
        ++at_;
    }

    uint32_t four_hex_digits() {
        uint32_t value = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char c = peek();
            if (c >= '0' && c <= '9') {
                value = value << 4 | static_cast<uint32_t>(c - '0');
            } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
                value = value << 4 | static_cast<uint32_t>((c | 0x20) - 'a' + 10);
            } else {
                fail("four hex digits");
            }
        }
        return value;
    }

    void digits() {
        if (!is_digit()) fail("a digit");
        while (is_digit()) ++at_;
    }

    Json number() {
        const size_t begin = at_;
        bool whole = true;
        take('-');
        if (!take('0')) digits();
        if (take('.')) {
            whole = false;
            digits();
        }
        if (peek() == 'e' || peek() == 'E') {
            whole = false;
            ++at_;
            if (!take('+')) take('-');
            digits();
        }
        const char *first = text_.data() + begin, *last = text_.data() + at_;
        if (whole) {
            int64_t value = 0;
            if (std::from_chars(first, last, value).ec != std::errc())
                fail_at(begin, "an integer of 64 bits", "a larger one");
            return Json(value);
        }
        double value = 0;
        if (std::from_chars(first, last, value).ec == std::errc()) {
            if (std::isinf(value)) fail_at(begin, "a number that a double holds", "a larger one");
            return Json(value);
        }
        // from_chars says the same of numbers too large and too small
        if (!is_tiny({first, static_cast<size_t>(last - first)}))
            fail_at(begin, "a number that a double holds", "a larger one");
        return Json(*first == '-' ? -0.0 : 0.0);
    }

    // Whether a number that is known to be far from 1 is nearer to 0.
    static bool is_tiny(std::string_view number) {
        const size_t exponent_at = std::min(number.find_first_of("eE"), number.size());
        const std::string_view digits = number.substr(0, exponent_at);
        const auto point = static_cast<int64_t>(std::min(digits.find('.'), digits.size()));
        const auto leading = static_cast<int64_t>(std::min(digits.find_first_of("123456789"), digits.size()));
        int64_t exponent = 0;
        if (exponent_at < number.size()) {
            const char* from = number.data() + exponent_at + 1;
            const bool negative = *from == '-';
            if (*from == '+' || negative) ++from;
            if (std::from_chars(from, number.data() + number.size(), exponent).ec != std::errc())
                exponent = INT64_MAX / 2;
            if (negative) exponent = -exponent;
        }
        return point - leading < -exponent;
    }

    std::string_view text_;
    size_t max_depth_;
    size_t at_ = 0;
};

[[noreturn]] void wrong_kind(const char* expected, Json::Kind found) {
    throw Error(FS_ERROR_BUNDLE, std::string("expected ") + expected + ", found " + kind_name(found));
}

// Python's repr: as few digits as give the same number, an exponent below 1e-4 and from 1e16 on.
void dump_double(double value, std::string& out) {
    char buffer[32];
    const char* end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
    std::string_view text(buffer, static_cast<size_t>(end - buffer));  // -d.ddde-xx
    if (text.front() == '-') {
        out += '-';
        text.remove_prefix(1);
    }
    const size_t e = text.find('e');
    std::string digits(1, text[0]);
    if (e > 1) digits += text.substr(2, e - 2);
    int exponent = 0;
    std::from_chars(text.data() + e + (text[e + 1] == '+' ? 2 : 1), end, exponent);
    if (exponent < -4 || exponent >= 16) {
        out += text;
    } else if (exponent < 0) {
        out += "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
    } else {
        const auto whole = static_cast<size_t>(exponent) + 1;
        if (digits.size() <= whole) digits.append(whole - digits.size() + 1, '0');
        out += digits.substr(0, whole) + "." + digits.substr(whole);
    }
}

void dump_string(const std::string& value, std::string& out) {
    out += '"';
    for (const char c : value) {
        switch (c) {
            case '"': out += "\\\""; break;
            case '\\': out += "\\\\"; break;
            case '\b': out += "\\b"; break;
            case '\f': out += "\\f"; break;
            case '\n': out += "\\n"; break;
            case '\r': out += "\\r"; break;
            case '\t': out += "\\t"; break;
            default:
                if (static_cast<uint8_t>(c) < 0x20) {
                    out += "\\u00";
                    out += static_cast<char>('0' + (c >> 4));
                    out += "0123456789abcdef"[c & 15];
                } else {
                    out += c;
                }
        }
    }
    out += '"';
}

void dump(const Json& value, std::string& out) {
    switch (value.kind()) {
        case Json::Kind::null: out += "null"; break;
        case Json::Kind::boolean: out += value.as_bool() ? "true" : "false"; break;
        case Json::Kind::integer: out += std::to_string(value.as_int()); break;
        case Json::Kind::number: dump_double(value.as_double(), out); break;
        case Json::Kind::string: dump_string(value.as_string(), out); break;
        case Json::Kind::array: {
            out += '[';
            for (const Json& item : value.items()) {
                if (&item != &value.items().front()) out += ',';
                dump(item, out);
            }
            out += ']';
            break;
        }
        case Json::Kind::object: {
            std::vector<const Json::Member*> sorted;
            for (const Json::Member& member : value.members()) sorted.push_back(&member);
            // the order of UTF-8 bytes is that of code points
            std::sort(sorted.begin(), sorted.end(), [](auto* a, auto* b) { return a->name < b->name; });
            out += '{';
            for (const Json::Member* member : sorted) {
                if (member != sorted.front()) out += ',';
                dump_string(member->name, out);
                out += ':';
                dump(member->value, out);
            }
            out += '}';
            break;
        }
    }
}

}  // namespace

// Not the variant's own: where memory runs out in the middle of it, that of libstdc++ 12 forgets what it holds and crashes.
Json::Json(const Json& other) {
    std::visit([this](const auto& value) {
        auto copy = value;
        value_ = std::move(copy);
    }, other.value_);
}

Json Json::parse(std::string_view text, size_t max_depth) { return Parser(text, max_depth).document(); }

bool Json::as_bool() const {
    if (const bool* value = std::get_if<bool>(&value_)) return *value;
    wrong_kind(kind_name(Kind::boolean), kind());
}

int64_t Json::as_int() const {
    if (const int64_t* value = std::get_if<int64_t>(&value_)) return *value;
    wrong_kind(kind_name(Kind::integer), kind());
}

double Json::as_double() const {
    if (const double* value = std::get_if<double>(&value_)) return *value;
    if (const int64_t* value = std::get_if<int64_t>(&value_)) return static_cast<double>(*value);
    wrong_kind(kind_name(Kind::number), kind());
}

const std::string& Json::as_string() const {
    if (const std::string* value = std::get_if<std::string>(&value_)) return *value;
    wrong_kind(kind_name(Kind::string), kind());
}

const Json::Array& Json::items() const {
    if (const Array* value = std::get_if<Array>(&value_)) return *value;
    wrong_kind(kind_name(Kind::array), kind());
}

const Json::Object& Json::members() const {
    if (const Object* value = std::get_if<Object>(&value_)) return *value;
    wrong_kind(kind_name(Kind::object), kind());
}

const Json* Json::find(std::string_view name) const {
    for (const Member& member : members()) {
        if (member.name == name) return &member.value;
    }
    return nullptr;
}

const char* kind_name(Json::Kind kind) {
    static const char* const names[] = {"null",     "true or false", "an integer", "a number",
                                        "a string", "a list",        "an object"};
    return names[static_cast<size_t>(kind)];
}

std::string dump_sorted(const Json& value) {
    std::string out;
    dump(value, out);
    return out;
}

bool is_utf8(std::string_view bytes) {
    while (!bytes.empty()) {
        const size_t length = utf8_length(bytes);
        if (length == 0) return false;
        bytes.remove_prefix(length);
    }
    return true;
}

}  // namespace framestep
