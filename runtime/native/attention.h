// Attention over a cache that a step writes a part of: what `TensorScatter` and `Attention` of a step graph do over time,
// in one pass over the memory, which bounds it. Numbers are float32 but for rings of INT8, rows follow each other without
// gaps; sums are taken in another order than a product of matrices would take them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "preprocess.h"

namespace framestep {

inline int64_t padded(int64_t slots) { return (slots + 15) / 16 * 16; }

// One query for each row over a ring of keys and values, which hold float or int8_t; one stream's part.
template <class Number>
struct RingAttention {
    const float* query;      // [rows, width]
    const float* new_key;    // [rows, width]
    const float* new_value;  // [rows, width]
    Number* key;             // [rows, window, width], written in slot `slot`
    Number* value;           // [rows, window, width]
    const float* key_scale;    // [rows], what an integer of a row stands for; of floats null
    const float* value_scale;  // [rows]
    float* result;           // [rows, width]
    const uint8_t* visible;  // [window], not 0: the slots that the query attends to; none: the result is zero
    int64_t window;
    int64_t width;
    int64_t slot;
    float scale;
};

inline size_t ring_attention_scratch(int64_t window) { return 2 * static_cast<size_t>(padded(window)); }

// Several query heads of one new token over the one head of keys and values that they share.
struct CachedAttention {
    static constexpr int64_t MOST_HEADS = 4;

    const float* query;      // [heads, width], before rotation
    const float* cosines;    // [width / 2]
    const float* sines;      // [width / 2]
    const float* key;        // [slots, width]
    const float* value;      // [slots, width]
    float* result;           // [heads, width]
    const uint8_t* visible;  // [slots], not 0: the slots that the queries attend to; none: the result is zero
    int64_t heads;           // at most MOST_HEADS
    int64_t slots;
    int64_t width;           // even
    float scale;
};

inline size_t cached_attention_scratch(int64_t slots, int64_t width) {
    constexpr size_t MOST = CachedAttention::MOST_HEADS;
    return (MOST + 1) * static_cast<size_t>(padded(slots)) + MOST * static_cast<size_t>(width);
}

// Several tokens at once, each with several query heads, over the one head of keys and values that they share.
struct ChunkAttention {
    static constexpr int64_t MOST_ROWS = 32;

    const float* query;      // the first token's first head; `token_stride` numbers to the next token's
    const float* cosines;    // [tokens, width / 2]
    const float* sines;      // [tokens, width / 2]
    const float* keys;       // as `pack_keys` lays them out
    const float* value;      // [slots, width]
    float* result;           // like the query
    const uint8_t* visible;  // [tokens, slots], not 0: the slots that a token attends to; none: its result is zero
    int64_t token_stride;
    int64_t tokens;
    int64_t heads;           // tokens * heads is at most MOST_ROWS
    int64_t slots;
    int64_t width;           // even
    float scale;
};

inline size_t chunk_attention_scratch(int64_t slots, int64_t width) {
    const auto row = static_cast<size_t>(padded(slots));
    return ChunkAttention::MOST_ROWS * (row + 2 * static_cast<size_t>(width)) + 3 * row;
}

// The kernels for one instruction set. `scratch` has room for as many floats as the function above says.
struct AttentionKernels {
    void (*ring)(const RingAttention<float>&, int64_t first, int64_t stop, float* scratch);  // rows first..stop
    void (*integer_ring)(const RingAttention<int8_t>&, int64_t first, int64_t stop, float* scratch);
    void (*cached)(const CachedAttention&, float* scratch);
    // Slots first..stop, multiples of 16, of keys [slots, width] into [padded(slots) / n, width, n], n slots side by side.
    void (*pack_keys)(const float* keys, int64_t slots, int64_t width, int64_t first, int64_t stop, float* out);
    void (*chunk)(const ChunkAttention&, float* scratch);
    // Rotary position embedding of one row, whose halves are real and imaginary parts; rounded as ONNX Runtime does it.
    void (*rotate)(const float* row, const float* cosines, const float* sines, int64_t width, float* out);
};
const AttentionKernels& attention_with(Simd simd);

}  // namespace framestep
