// Attention of one query for each row over a ring of keys and values that a step writes one slot of: what `TensorScatter`
// (twice) and `Attention` of a step graph do over time, in one pass over the memory, which bounds it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "preprocess.h"

namespace framestep {

// One stream's part. Numbers are float32, rows follow each other without gaps.
struct RingAttention {
    const float* query;      // [rows, width]
    const float* new_key;    // [rows, width]
    const float* new_value;  // [rows, width]
    float* key;              // [rows, window, width], written in slot `slot`
    float* value;            // [rows, window, width]
    float* result;           // [rows, width]
    const bool* visible;     // [window]: the slots that the query attends to; none: the result is zero
    int64_t window;
    int64_t width;
    int64_t slot;
    float scale;
};

// Rows first..stop. `scratch` has room for `ring_attention_scratch(window)` floats. Sums are float32, in another order than
// a product of matrices would take them.
using RingAttentionRows = void (*)(const RingAttention&, int64_t first, int64_t stop, float* scratch);
RingAttentionRows ring_attention_with(Simd simd);
inline size_t ring_attention_scratch(int64_t window) { return 2 * static_cast<size_t>((window + 15) / 16 * 16); }

}  // namespace framestep
