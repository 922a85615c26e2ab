#include "ring_operator.h"

#include <vector>

namespace framestep {
namespace {

constexpr int64_t ROWS = 32;       // that a thread takes at a time
constexpr size_t ON_STACK = 4096;  // floats: of windows up to 2,048
enum Input : size_t { QUERY, PAST_KEY, NEW_KEY, PAST_VALUE, NEW_VALUE, INDEX, MASK, KEY_SCALE, VALUE_SCALE };
enum Output : size_t { RESULT, KEY, VALUE };

template <class Number>
constexpr OrtElement ELEMENT = std::is_same_v<Number, int8_t> ? ORT_INT8 : ORT_FLOAT;

}  // namespace

template <class Number>
OrtElement RingKernel<Number>::input_type(size_t index) {
    return index == INDEX ? ORT_INT64 : index == MASK ? ORT_BOOL
         : index == PAST_KEY || index == PAST_VALUE ? ELEMENT<Number> : ORT_FLOAT;
}

template <class Number>
OrtElement RingKernel<Number>::output_type(size_t index) {
    return index == RESULT ? ORT_FLOAT : ELEMENT<Number>;
}

template <class Number>
RingKernel<Number>::RingKernel(const Ort& its, const Shared*, const OrtKernelInfo* info)
    : ort(its), scale_(KernelCalls(its).number(info, "scale")), kernels_(attention_with(fastest_simd())) {}

template <class Number>
void RingKernel<Number>::compute(OrtKernelContext* context) const {
    const KernelCalls calls(ort);
    const OrtValue* inputs[INPUTS];
    for (size_t index = 0; index < INPUTS; ++index) inputs[index] = calls.input(context, index);
    const TensorShape shape = calls.shape(inputs[PAST_KEY]);
    const int64_t streams = shape.sizes[0], rows = shape.sizes[1], window = shape.sizes[2], width = shape.sizes[3];
    const TensorShape one = {4, {streams, rows, 1, width}};
    if (shape.rank != 4 || !(calls.shape(inputs[PAST_VALUE]) == shape) || !(calls.shape(inputs[QUERY]) == one) ||
        !(calls.shape(inputs[NEW_KEY]) == one) || !(calls.shape(inputs[NEW_VALUE]) == one) ||
        !(calls.shape(inputs[MASK]) == TensorShape{4, {streams, 1, 1, window}}) ||
        !(calls.shape(inputs[INDEX]) == TensorShape{1, {streams}})) {
        throw Refused{"the inputs' shapes do not belong together"};
    }
    if constexpr (INTEGER) {
        const TensorShape each_row = {1, {rows}};
        if (!(calls.shape(inputs[KEY_SCALE]) == each_row) || !(calls.shape(inputs[VALUE_SCALE]) == each_row)) {
            throw Refused{"the scales are not those of the rings' rows"};
        }
    }
    const auto* slots = calls.data<const int64_t>(inputs[INDEX]);
    for (int64_t stream = 0; stream < streams; ++stream) {
        if (slots[stream] < 0 || slots[stream] >= window) throw Refused{"a slot outside the ring"};
    }
    const int64_t numbers = streams * rows * window * width;
    RingAttention<Number> first = {};  // the first stream's
    first.query = calls.data<const float>(inputs[QUERY]);
    first.new_key = calls.data<const float>(inputs[NEW_KEY]);
    first.new_value = calls.data<const float>(inputs[NEW_VALUE]);
    first.result = calls.data<float>(calls.output(context, RESULT, one));
    first.key = calls.updated<Number>(inputs[PAST_KEY], calls.output(context, KEY, shape), numbers);
    first.value = calls.updated<Number>(inputs[PAST_VALUE], calls.output(context, VALUE, shape), numbers);
    if constexpr (INTEGER) {
        first.key_scale = calls.data<const float>(inputs[KEY_SCALE]);
        first.value_scale = calls.data<const float>(inputs[VALUE_SCALE]);
    }
    first.visible = calls.data<const uint8_t>(inputs[MASK]);
    first.window = window;
    first.width = width;
    first.scale = scale_;
    const auto attend = [&] {
        if constexpr (INTEGER) return kernels_.integer_ring;
        else return kernels_.ring;
    }();
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    calls.parallel(context, streams * blocks, [&](int64_t index) {
        const int64_t stream = index / blocks, from = index % blocks * ROWS;
        const int64_t before = stream * rows * width;
        RingAttention<Number> ring = first;
        ring.query += before;
        ring.new_key += before;
        ring.new_value += before;
        ring.result += before;
        ring.key += before * window;
        ring.value += before * window;
        ring.visible += stream * window;
        ring.slot = slots[stream];
        const int64_t stop = std::min(from + ROWS, rows);
        if (ring_attention_scratch(window) <= ON_STACK) {
            alignas(64) float scratch[ON_STACK];
            return attend(ring, from, stop, scratch);
        }
        thread_local std::vector<float> scratch;  // each thread asks for it once
        scratch.resize(std::max(scratch.size(), ring_attention_scratch(window)));
        attend(ring, from, stop, scratch.data());
    });
}

template class RingKernel<float>;
template class RingKernel<int8_t>;

}  // namespace framestep
