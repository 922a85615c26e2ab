#include "sha256.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "file_io.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace framestep {
namespace {

constexpr size_t BLOCK_BYTES = 64;
constexpr size_t PIECE_BYTES = 1 << 18;

using State = std::array<uint32_t, 8>;
using Compress = void (*)(State& state, const uint8_t* blocks, size_t count);

alignas(16) constexpr uint32_t CONSTANTS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t rotate(uint32_t value, int bits) { return value >> bits | value << (32 - bits); }

uint32_t big_endian(const uint8_t* bytes) {
    return uint32_t{bytes[0]} << 24 | uint32_t{bytes[1]} << 16 | uint32_t{bytes[2]} << 8 | bytes[3];
}

void compress_portable(State& state, const uint8_t* blocks, size_t count) {
    for (; count > 0; --count, blocks += BLOCK_BYTES) {
        uint32_t w[64];
        for (int i = 0; i < 16; ++i) w[i] = big_endian(blocks + 4 * i);
        for (int i = 16; i < 64; ++i) {
            const uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
            const uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        auto [a, b, c, d, e, f, g, h] = state;
#pragma GCC unroll 8  // the eight variables are back in their places
        for (int i = 0; i < 64; ++i) {
            const uint32_t t1 =
                h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + (g ^ (e & (f ^ g))) + CONSTANTS[i] + w[i];
            const uint32_t t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (c & (a ^ b)));
            h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
        }
        const State added = {a, b, c, d, e, f, g, h};
        for (size_t i = 0; i < state.size(); ++i) state[i] += added[i];
    }
}

#if defined(__x86_64__)
// With the instructions for SHA-256: two rounds at a time on the state as {A, B, E, F} and {C, D, G, H}, four words of
// the message schedule in a vector.
__attribute__((target("sha,sse4.1"))) void compress_sha_ni(State& state, const uint8_t* blocks, size_t count) {
    const __m128i big_endian_words = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    auto at = [](const uint32_t* words) { return reinterpret_cast<const __m128i*>(words); };
    const __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128(at(&state[0])), 0xB1);  // from the highest lane: C D A B
    const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(at(&state[4])), 0x1B);  // E F G H
    __m128i abef = _mm_alignr_epi8(badc, efgh, 8);
    __m128i cdgh = _mm_blend_epi16(efgh, badc, 0xF0);
    for (; count > 0; --count, blocks += BLOCK_BYTES) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
        for (int i = 0; i < 4; ++i) {
            const auto* words = reinterpret_cast<const __m128i*>(blocks + 16 * i);
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128(words), big_endian_words);
        }
        for (int i = 0; i < 16; ++i) {
            const __m128i now = w[i % 4];
            const __m128i sum = _mm_add_epi32(now, _mm_load_si128(at(&CONSTANTS[4 * i])));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));
            // w[i + 4] from w[i], w[i + 1], w[i + 2], w[i + 3]
            const __m128i last = w[(i + 3) % 4];
            const __m128i minus_7 = _mm_alignr_epi8(last, w[(i + 2) % 4], 4);
            w[i % 4] = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(now, w[(i + 1) % 4]), minus_7), last);
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1B);
    const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    auto* out = reinterpret_cast<__m128i*>(state.data());
    _mm_storeu_si128(out, _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128(out + 1, _mm_alignr_epi8(dchg, feba, 8));
}

bool has_sha_ni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_1)) return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_SHA);
}
#endif

Compress fastest() {
#if defined(__x86_64__)
    if (has_sha_ni()) return compress_sha_ni;
#endif
    return compress_portable;
}

class Sha256 {
public:
    void add(const uint8_t* bytes, size_t size) {
        total_ += size;
        if (held_ > 0) {
            const size_t part = std::min(size, BLOCK_BYTES - held_);
            std::memcpy(block_ + held_, bytes, part);
            held_ += part, bytes += part, size -= part;
            if (held_ < BLOCK_BYTES) return;
            compress(state_, block_, 1);
        }
        compress(state_, bytes, size / BLOCK_BYTES);
        held_ = size % BLOCK_BYTES;
        if (held_ > 0) std::memcpy(block_, bytes + size - held_, held_);
    }

    std::string finish() {
        const uint64_t bits = total_ * 8;
        const uint8_t padding[BLOCK_BYTES] = {0x80};
        add(padding, 1 + (2 * BLOCK_BYTES - 9 - held_) % BLOCK_BYTES);
        uint8_t length[8];
        for (int i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
        add(length, sizeof length);
        std::string hex;
        for (const uint32_t word : state_) {
            for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
        }
        return hex;
    }

private:
    static inline const Compress compress = fastest();

    State state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t block_[BLOCK_BYTES] = {};
    size_t held_ = 0;
    uint64_t total_ = 0;
};

}  // namespace

std::string sha256_hex(std::string_view bytes) {
    Sha256 hash;
    hash.add(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    return hash.finish();
}

std::string sha256_hex(const std::filesystem::path& file) {
    InputFile input(file, FS_ERROR_BUNDLE);
    std::vector<uint8_t> piece(PIECE_BYTES);
    Sha256 hash;
    while (const size_t size = input.read(piece.data(), piece.size())) hash.add(piece.data(), size);
    return hash.finish();
}

}  // namespace framestep
