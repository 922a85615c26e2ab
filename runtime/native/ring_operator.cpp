#include "ring_operator.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "ring_attention.h"
#include "ring_graph.h"

namespace framestep {
namespace {

constexpr int64_t ROWS = 32;        // that a thread takes at a time
constexpr size_t ON_STACK = 4096;  // floats: of windows up to 2,048
constexpr size_t INPUTS = 7, OUTPUTS = 3;
enum Input : size_t { QUERY, PAST_KEY, NEW_KEY, PAST_VALUE, NEW_VALUE, INDEX, MASK };
enum Output : size_t { RESULT, KEY, VALUE };

struct Operator : OrtCustomOp {
    const Ort* ort;
};

struct Kernel {
    const Ort* ort;
    float scale;
    RingAttentionRows rows;
};

struct Work {  // of one run
    const Kernel* kernel;
    RingAttention first;  // the first stream's
    const int64_t* slots;  // of each stream
    int64_t rows;
    int64_t blocks;  // of rows in a stream
};

struct Refused {
    const char* why;
};

void check(const Ort& ort, OrtStatus* status) {
    if (status == nullptr) return;
    ort.ReleaseStatus(status);
    throw Refused{"RingAttention: ONNX Runtime refused a call"};
}

struct Shape {
    size_t rank;
    int64_t sizes[4];

    bool operator==(const Shape& other) const {
        return rank == other.rank && std::equal(sizes, sizes + rank, other.sizes);
    }
};

Shape shape_of(const Ort& ort, const OrtValue* value) {
    OrtTensorInfo* info = nullptr;
    check(ort, ort.GetTensorTypeAndShape(value, &info));
    Shape shape = {};
    OrtStatus* status = ort.GetDimensionsCount(info, &shape.rank);
    shape.rank = std::min(shape.rank, size_t{4});
    if (status == nullptr) status = ort.GetDimensions(info, shape.sizes, shape.rank);
    ort.ReleaseTensorTypeAndShapeInfo(info);
    check(ort, status);
    return shape;
}

template <class T>
T* data_of(const Ort& ort, const OrtValue* value) {
    void* data = nullptr;
    check(ort, ort.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    return static_cast<T*>(data);
}

void run_block(void* user, size_t index) {
    const Work& work = *static_cast<const Work*>(user);
    const int64_t stream = static_cast<int64_t>(index) / work.blocks;
    const int64_t first = static_cast<int64_t>(index) % work.blocks * ROWS;
    RingAttention ring = work.first;
    const int64_t numbers = stream * work.rows * ring.width;
    ring.query += numbers;
    ring.new_key += numbers;
    ring.new_value += numbers;
    ring.result += numbers;
    ring.key += numbers * ring.window;
    ring.value += numbers * ring.window;
    ring.visible += stream * ring.window;
    ring.slot = work.slots[stream];
    const int64_t stop = std::min(first + ROWS, work.rows);
    if (ring_attention_scratch(ring.window) <= ON_STACK) {
        alignas(64) float scratch[ON_STACK];
        return work.kernel->rows(ring, first, stop, scratch);
    }
    thread_local std::vector<float> scratch;  // each thread asks for it once
    scratch.resize(std::max(scratch.size(), ring_attention_scratch(ring.window)));
    work.kernel->rows(ring, first, stop, scratch.data());
}

void compute(const Kernel& kernel, OrtKernelContext* context) {
    const Ort& ort = *kernel.ort;
    const OrtValue* inputs[INPUTS];
    for (size_t index = 0; index < INPUTS; ++index) check(ort, ort.KernelContext_GetInput(context, index, &inputs[index]));
    const Shape shape = shape_of(ort, inputs[PAST_KEY]);
    const auto [streams, rows, window, width] = shape.sizes;
    const Shape one = {4, {streams, rows, 1, width}};
    if (shape.rank != 4 || !(shape_of(ort, inputs[PAST_VALUE]) == shape) || !(shape_of(ort, inputs[QUERY]) == one) ||
        !(shape_of(ort, inputs[NEW_KEY]) == one) || !(shape_of(ort, inputs[NEW_VALUE]) == one) ||
        !(shape_of(ort, inputs[MASK]) == Shape{4, {streams, 1, 1, window}}) ||
        !(shape_of(ort, inputs[INDEX]) == Shape{1, {streams}})) {
        throw Refused{"RingAttention: the inputs' shapes do not belong together"};
    }
    OrtValue* outputs[OUTPUTS];
    check(ort, ort.KernelContext_GetOutput(context, RESULT, one.sizes, one.rank, &outputs[RESULT]));
    check(ort, ort.KernelContext_GetOutput(context, KEY, shape.sizes, shape.rank, &outputs[KEY]));
    check(ort, ort.KernelContext_GetOutput(context, VALUE, shape.sizes, shape.rank, &outputs[VALUE]));
    Work work = {};
    work.kernel = &kernel;
    work.slots = data_of<const int64_t>(ort, inputs[INDEX]);
    for (int64_t stream = 0; stream < streams; ++stream) {
        if (work.slots[stream] < 0 || work.slots[stream] >= window) throw Refused{"RingAttention: a slot outside the ring"};
    }
    const int64_t numbers = streams * rows * window * width;
    const auto ring = [&](Output output, Input past) {
        auto* present = data_of<float>(ort, outputs[output]);
        const auto* before = data_of<const float>(ort, inputs[past]);
        if (present != before) std::copy_n(before, numbers, present);
        return present;
    };
    work.first.query = data_of<const float>(ort, inputs[QUERY]);
    work.first.new_key = data_of<const float>(ort, inputs[NEW_KEY]);
    work.first.new_value = data_of<const float>(ort, inputs[NEW_VALUE]);
    work.first.key = ring(KEY, PAST_KEY);
    work.first.value = ring(VALUE, PAST_VALUE);
    work.first.result = data_of<float>(ort, outputs[RESULT]);
    work.first.visible = data_of<const bool>(ort, inputs[MASK]);
    work.first.window = window;
    work.first.width = width;
    work.first.scale = kernel.scale;
    work.rows = rows;
    work.blocks = (rows + ROWS - 1) / ROWS;
    check(ort, ort.KernelContext_ParallelFor(context, run_block, static_cast<size_t>(streams * work.blocks), 0, &work));
}

OrtStatus* guarded(const Ort& ort, void (*call)(void*, void*), void* left, void* right) {
    constexpr int FAIL = 1;
    try {
        call(left, right);
        return nullptr;
    } catch (const Refused& refused) {
        return ort.CreateStatus(FAIL, refused.why);
    } catch (const std::exception& error) {
        return ort.CreateStatus(FAIL, error.what());
    }
}

Operator make_operator(const Ort& ort) {
    Operator made = {};
    made.version = ORT_API_VERSION_USED;
    made.ort = &ort;
    made.GetName = [](const OrtCustomOp*) { return RING_OPERATOR; };
    made.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
    made.GetInputTypeCount = [](const OrtCustomOp*) { return INPUTS; };
    made.GetInputType = [](const OrtCustomOp*, size_t index) -> int {
        return index == INDEX ? ORT_INT64 : index == MASK ? ORT_BOOL : ORT_FLOAT;
    };
    made.GetOutputTypeCount = [](const OrtCustomOp*) { return OUTPUTS; };
    made.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return ORT_FLOAT; };
    made.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };  // required
    made.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
    made.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ORT_MEMORY_DEFAULT; };
    made.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    made.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
    made.CreateKernelV2 = [](const OrtCustomOp* op, const void*, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
        const Ort& ort = *static_cast<const Operator*>(op)->ort;
        float scale = 0;
        if (OrtStatus* status = ort.KernelInfoGetAttribute_float(info, "scale", &scale)) return status;
        *kernel = new Kernel{&ort, scale, ring_attention_with(fastest_simd())};
        return nullptr;
    };
    made.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
        const auto call = [](void* left, void* right) {
            compute(*static_cast<const Kernel*>(left), static_cast<OrtKernelContext*>(right));
        };
        return guarded(*static_cast<const Kernel*>(kernel)->ort, call, kernel, context);
    };
    made.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return made;
}

}  // namespace

const OrtCustomOp* ring_operator(const Ort& ort) {
    static std::mutex lock;
    static auto& made = *new std::map<const Ort*, Operator>;  // never freed, as ONNX Runtime is never unloaded
    std::lock_guard guard(lock);
    return &made.try_emplace(&ort, make_operator(ort)).first->second;
}

}  // namespace framestep
