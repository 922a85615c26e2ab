// Structs of the C interface, which may have grown since a caller was compiled, or since this library was.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "error.h"

#ifndef FRAMESTEP_VERSION
#error "the build gives FRAMESTEP_VERSION"
#endif

namespace framestep {

// The number that a caller put where an enum is: any, though C++ may take it to be one of the enum's.
template <class Enum>
int number_of(const Enum& value) {
    int number;
    static_assert(sizeof number == sizeof value, "an enum of the header is an int");
    std::memcpy(&number, &value, sizeof number);
    return number;
}

inline void need(const void* pointer, const char* name) {
    if (pointer == nullptr) throw Error(FS_ERROR_ARGUMENT, std::string(name) + ": is null");
}

// The size that a struct had when it was first given out; it may have grown since.
template <class Struct>
inline constexpr size_t FIRST_SIZE = sizeof(Struct);
template <>
inline constexpr size_t FIRST_SIZE<fs_graph_info> = offsetof(fs_graph_info, own_operators);

inline void check_size(size_t size, size_t expected, const char* name) {
    if (size < expected) {
        throw Error(FS_ERROR_ARGUMENT, std::string(name) + ": struct_size is " + std::to_string(size) + ", expected " +
                                           std::to_string(expected) + "; set it to sizeof the struct");
    }
}

// A caller's struct as this library knows it.
template <class Struct>
Struct read_struct(const void* given, const char* name) {
    need(given, name);
    size_t size;
    std::memcpy(&size, given, sizeof size);
    check_size(size, FIRST_SIZE<Struct>, name);
    const auto* bytes = static_cast<const unsigned char*>(given);
    constexpr size_t MAX_SIZE = 4096;
    const size_t known = std::min(size, sizeof(Struct));
    if (size > MAX_SIZE || std::any_of(bytes + known, bytes + size, [](unsigned char byte) { return byte != 0; })) {
        throw Error(FS_ERROR_ARGUMENT, std::string(name) + ": struct_size is " + std::to_string(size) +
                                           ", and it has members that this library of version " FRAMESTEP_VERSION
                                           " does not know");
    }
    Struct value{};
    std::memcpy(&value, given, known);
    return value;
}

// What the caller's struct keeps is its size and what lies beyond this library's members.
template <class Struct>
void check_out(const Struct* out, const char* name) {
    need(out, name);
    check_size(out->struct_size, FIRST_SIZE<Struct>, name);
}

template <class Struct>
void write_struct(Struct* out, Struct value) {
    value.struct_size = out->struct_size;
    std::memcpy(out, &value, std::min(value.struct_size, sizeof value));
}

}  // namespace framestep
