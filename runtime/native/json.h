// A strict reader of JSON (RFC 8259) for manifests and safetensors headers, and the one writer that the state key
// needs.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace framestep {

// A JSON value; objects keep the order of their members. The order of kinds is that of the variant's types.
class Json {
public:
    enum class Kind { null, boolean, integer, number, string, array, object };
    struct Member;
    using Array = std::vector<Json>;
    using Object = std::vector<Member>;

    Json() = default;
    explicit Json(bool value) : value_(value) {}
    explicit Json(int64_t value) : value_(value) {}
    explicit Json(double value) : value_(value) {}
    explicit Json(std::string value) : value_(std::move(value)) {}
    explicit Json(const char* value) : value_(std::string(value)) {}
    explicit Json(Array items) : value_(std::move(items)) {}
    explicit Json(Object members) : value_(std::move(members)) {}
    Json(const Json& other);
    Json(Json&&) noexcept = default;
    Json& operator=(const Json& other) { return *this = Json(other); }
    Json& operator=(Json&&) noexcept = default;
    ~Json() = default;

    // Reads one value that fills `text`. Refused beside bad syntax: text that is not UTF-8, half of a surrogate pair, a
    // name that stands twice in an object, numbers beyond int64 or double, more than `max_depth` nested arrays and
    // objects. Throws Error (FS_ERROR_BUNDLE) with the byte offset, what was expected and what was found.
    static Json parse(std::string_view text, size_t max_depth = 64);

    Kind kind() const { return static_cast<Kind>(value_.index()); }

    // The value as one kind; any other throws Error (FS_ERROR_BUNDLE). as_double also takes an integer.
    bool as_bool() const;
    int64_t as_int() const;
    double as_double() const;
    const std::string& as_string() const;
    const Array& items() const;
    const Object& members() const;

    // A member's value, null where an object has none of this name; throws like members().
    const Json* find(std::string_view name) const;

private:
    std::variant<std::monostate, bool, int64_t, double, std::string, Array, Object> value_;
};

struct Json::Member {
    std::string name;
    Json value;
};

// "an object", "a string" and so on, for messages.
const char* kind_name(Json::Kind kind);

// What Python's json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False) gives. Numbers are finite.
std::string dump_sorted(const Json& value);

// Whether bytes are UTF-8: no overlong forms, no surrogates, nothing beyond U+10FFFF.
bool is_utf8(std::string_view bytes);

}  // namespace framestep
