#include "cache_operator.h"

#include <cstring>
#include <vector>

namespace framestep {
namespace {

constexpr int64_t CHUNK = 4;    // tokens: from so many on, laying the keys out anew pays
constexpr int64_t PACKED = 64;  // slots that a thread lays out at a time
enum Input : size_t { QUERY, NEW_KEY, NEW_VALUE, COSINES, SINES, PAST_RAW_KEY, PAST_KEY, PAST_VALUE, INDEX, MASK };
enum Output : size_t { RESULT, RAW_KEY, KEY, VALUE };

}  // namespace

OrtElement CacheKernel::input_type(size_t index) { return index == INDEX ? ORT_INT64 : index == MASK ? ORT_BOOL : ORT_FLOAT; }

CacheKernel::CacheKernel(const Ort& its, const Shared*, const OrtKernelInfo* info)
    : ort(its), scale_(KernelCalls(its).number(info, "scale")), kernels_(attention_with(fastest_simd())) {}

void CacheKernel::compute(OrtKernelContext* context) const {
    const KernelCalls calls(ort);
    const OrtValue* inputs[INPUTS];
    TensorShape shapes[INPUTS];
    for (size_t index = 0; index < INPUTS; ++index) {
        inputs[index] = calls.input(context, index);
        shapes[index] = calls.shape(inputs[index]);
    }
    const TensorShape &cache = shapes[PAST_KEY], &query = shapes[QUERY];
    const int64_t streams = cache.sizes[0], groups = cache.sizes[1], slots = cache.sizes[2], width = cache.sizes[3];
    const int64_t tokens = query.sizes[1], heads = width > 0 ? query.sizes[2] / width : 0;
    const TensorShape rows = {3, {streams, tokens, groups * width}}, half = {3, {streams, tokens, width / 2}};
    if (cache.rank != 4 || groups < 1 || width < 2 || width % 2 != 0 || heads < 1 || heads % groups != 0 ||
        !(query == TensorShape{3, {streams, tokens, heads * width}}) || !(shapes[NEW_KEY] == rows) ||
        !(shapes[NEW_VALUE] == rows) || !(shapes[COSINES] == half) || !(shapes[SINES] == half) ||
        !(shapes[PAST_RAW_KEY] == cache) || !(shapes[PAST_VALUE] == cache) ||
        !(shapes[MASK] == TensorShape{4, {streams, 1, tokens, slots}}) || !(shapes[INDEX] == TensorShape{1, {streams}})) {
        throw Refused{"the inputs' shapes do not belong together"};
    }
    const auto* index = calls.data<const int64_t>(inputs[INDEX]);
    for (int64_t stream = 0; stream < streams; ++stream) {
        if (index[stream] < 0 || index[stream] > slots - tokens) throw Refused{"the new tokens do not fit into the cache"};
    }
    const auto* queries = calls.data<const float>(inputs[QUERY]);
    const auto* new_keys = calls.data<const float>(inputs[NEW_KEY]);
    const auto* new_values = calls.data<const float>(inputs[NEW_VALUE]);
    const auto* cosines = calls.data<const float>(inputs[COSINES]);
    const auto* sines = calls.data<const float>(inputs[SINES]);
    const auto* mask = calls.data<const uint8_t>(inputs[MASK]);
    auto* result = calls.data<float>(calls.output(context, RESULT, query));
    const int64_t numbers = streams * groups * slots * width;
    const auto updated = [&](Input past, Output present) {
        return calls.updated<float>(inputs[past], calls.output(context, present, cache), numbers);
    };
    float* raw_keys = updated(PAST_RAW_KEY, RAW_KEY);
    float* keys = updated(PAST_KEY, KEY);
    float* values = updated(PAST_VALUE, VALUE);

    const size_t row_bytes = static_cast<size_t>(width) * sizeof(float);
    for (int64_t token = 0; token < streams * tokens; ++token) {  // of all streams
        const int64_t stream = token / tokens, slot = index[stream] + token % tokens;
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t from = (token * groups + group) * width;
            const int64_t to = ((stream * groups + group) * slots + slot) * width;
            std::memcpy(raw_keys + to, new_keys + from, row_bytes);
            std::memcpy(values + to, new_values + from, row_bytes);
            kernels_.rotate(new_keys + from, cosines + token * width / 2, sines + token * width / 2, width, keys + to);
        }
    }
    const int64_t each = heads / groups;
    const auto scratch_of = [](size_t floats) {
        thread_local std::vector<float> scratch;  // each thread asks for it once
        scratch.resize(std::max(scratch.size(), floats));
        return scratch.data();
    };
    if (tokens < CHUNK) {
        const int64_t parts = (each + CachedAttention::MOST_HEADS - 1) / CachedAttention::MOST_HEADS;
        calls.parallel(context, streams * tokens * groups * parts, [&](int64_t item) {
            const int64_t part = item % parts, group = item / parts % groups, token = item / parts / groups;
            const int64_t stream_group = token / tokens * groups + group;
            const int64_t first = part * each / parts, stop = (part + 1) * each / parts;
            const int64_t row = (token * heads + group * each + first) * width;
            CachedAttention one = {};
            one.query = queries + row;
            one.cosines = cosines + token * width / 2;
            one.sines = sines + token * width / 2;
            one.key = keys + stream_group * slots * width;
            one.value = values + stream_group * slots * width;
            one.result = result + row;
            one.visible = mask + token * slots;
            one.heads = stop - first;
            one.slots = slots;
            one.width = width;
            one.scale = scale_;
            kernels_.cached(one, scratch_of(cached_attention_scratch(slots, width)));
        });
        return;
    }
    const int64_t packed_size = padded(slots) * width, packs = (slots + PACKED - 1) / PACKED;
    thread_local std::vector<float> packed;
    packed.resize(std::max(packed.size(), static_cast<size_t>(streams * groups * packed_size)));
    float* const packed_keys = packed.data();  // this thread's, also where others read it
    calls.parallel(context, streams * groups * packs, [&](int64_t item) {
        const int64_t stream_group = item / packs, first = item % packs * PACKED;
        kernels_.pack_keys(keys + stream_group * slots * width, slots, width, first, std::min(first + PACKED, padded(slots)),
                           packed_keys + stream_group * packed_size);
    });
    const int64_t head_parts = (each + ChunkAttention::MOST_ROWS - 1) / ChunkAttention::MOST_ROWS;
    const int64_t many = (each + head_parts - 1) / head_parts;  // heads in a part, at most
    const int64_t few = ChunkAttention::MOST_ROWS / many;      // tokens in a part, at most
    const int64_t token_parts = (tokens + few - 1) / few;
    calls.parallel(context, streams * groups * head_parts * token_parts, [&](int64_t item) {
        const int64_t token_part = item % token_parts, head_part = item / token_parts % head_parts;
        const int64_t stream_group = item / token_parts / head_parts, group = stream_group % groups;
        const int64_t in_stream = token_part * few, token = stream_group / groups * tokens + in_stream;
        const int64_t first = head_part * many;
        const int64_t row = (token * heads + group * each + first) * width;
        ChunkAttention chunk = {};
        chunk.query = queries + row;
        chunk.cosines = cosines + token * width / 2;
        chunk.sines = sines + token * width / 2;
        chunk.keys = packed_keys + stream_group * packed_size;
        chunk.value = values + stream_group * slots * width;
        chunk.result = result + row;
        chunk.visible = mask + token * slots;
        chunk.token_stride = heads * width;
        chunk.tokens = std::min(few, tokens - in_stream);
        chunk.heads = std::min(many, each - first);
        chunk.slots = slots;
        chunk.width = width;
        chunk.scale = scale_;
        kernels_.chunk(chunk, scratch_of(chunk_attention_scratch(slots, width)));
    });
}

}  // namespace framestep
