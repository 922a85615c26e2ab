// Whether numbers have NaN or infinity among them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "framestep.h"

namespace framestep {

constexpr uint32_t FLOAT32_EXPONENT = 0x7F800000;
constexpr uint16_t FLOAT16_EXPONENT = 0x7C00;

// A number is NaN or infinite where all bits of its exponent are set. No branch, so that it takes many at a time.
template <class Bits>
bool all_finite(const void* data, size_t bytes, Bits exponent) {
    Bits bad = 0;
    for (size_t at = 0; at + sizeof(Bits) <= bytes; at += sizeof(Bits)) {
        Bits bits;
        std::memcpy(&bits, static_cast<const uint8_t*>(data) + at, sizeof bits);
        bad |= static_cast<Bits>((bits & exponent) == exponent);
    }
    return bad == 0;
}

// Of integers all are.
inline bool all_finite(const void* data, size_t bytes, fs_dtype dtype) {
    if (dtype == FS_FLOAT32) return all_finite(data, bytes, FLOAT32_EXPONENT);
    if (dtype == FS_FLOAT16) return all_finite(data, bytes, FLOAT16_EXPONENT);
    return true;
}

}  // namespace framestep
