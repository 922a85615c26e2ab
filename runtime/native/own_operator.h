// What operators of ours have in common, as ONNX Runtime calls them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <string>

#include "onnx_graph.h"
#include "ort_api.h"

namespace framestep {

// A kernel's refusal; ONNX Runtime gives it to the caller.
struct Refused {
    std::string why;
};

struct TensorShape {
    static constexpr size_t MOST = 8;  // axes

    size_t rank = 0;
    int64_t sizes[MOST] = {};

    bool operator==(const TensorShape& other) const {
        return rank == other.rank && std::equal(sizes, sizes + std::min(rank, MOST), other.sizes);
    }
};

// An operator: its members as ONNX Runtime reads them, and what its kernels take with them.
template <class Kernel>
struct OwnOperator : OrtCustomOp {
    const Ort* ort;
    const typename Kernel::Shared* shared;
};

// The calls of ONNX Runtime in a kernel; they throw Refused.
class KernelCalls {
public:
    explicit KernelCalls(const Ort& ort) : ort_(ort) {}

    void check(OrtStatus* status) const {
        if (status == nullptr) return;
        const Refused refused = {std::string("ONNX Runtime refused a call: ") + ort_.GetErrorMessage(status)};
        ort_.ReleaseStatus(status);
        throw refused;
    }

    const OrtValue* input(OrtKernelContext* context, size_t index) const {
        const OrtValue* value = nullptr;
        check(ort_.KernelContext_GetInput(context, index, &value));
        return present(value, "input ", index);
    }

    OrtValue* output(OrtKernelContext* context, size_t index, const TensorShape& shape) const {
        OrtValue* value = nullptr;
        check(ort_.KernelContext_GetOutput(context, index, shape.sizes, shape.rank, &value));
        return present(value, "output ", index);
    }

    TensorShape shape(const OrtValue* value) const {
        OrtTensorInfo* info = nullptr;
        check(ort_.GetTensorTypeAndShape(value, &info));
        TensorShape shape;
        OrtStatus* status = ort_.GetDimensionsCount(info, &shape.rank);
        if (status == nullptr) status = ort_.GetDimensions(info, shape.sizes, std::min(shape.rank, TensorShape::MOST));
        ort_.ReleaseTensorTypeAndShapeInfo(info);
        check(status);
        return shape;
    }

    template <class T>
    T* data(const OrtValue* value) const {
        void* data = nullptr;
        check(ort_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
        return static_cast<T*>(data);
    }

    // call(index) for each index below `count`, on all threads of the session.
    template <class Call>
    void parallel(OrtKernelContext* context, int64_t count, const Call& call) const {
        struct Calls {
            const Call& call;
            std::atomic<bool> no_memory{false};
        } calls{call};
        const auto each = [](void* user, size_t index) {
            auto& its = *static_cast<Calls*>(user);
            try {
                its.call(static_cast<int64_t>(index));
            } catch (const std::bad_alloc&) {  // nothing may be thrown through ONNX Runtime's threads
                its.no_memory = true;
            }
        };
        check(ort_.KernelContext_ParallelFor(context, each, static_cast<size_t>(count), 0, &calls));
        if (calls.no_memory) throw std::bad_alloc();
    }

    float number(const OrtKernelInfo* info, const char* name) const {
        float value = 0;
        check(ort_.KernelInfoGetAttribute_float(info, name, &value));
        return value;
    }

    int64_t integer(const OrtKernelInfo* info, const char* name) const {
        int64_t value = 0;
        check(ort_.KernelInfoGetAttribute_int64(info, name, &value));
        return value;
    }

    // The memory of an output that updates an input: the same where both are bound to one buffer, else a copy of it.
    template <class Number>
    Number* updated(const OrtValue* before, const OrtValue* after, int64_t count) const {
        const auto* from = data<const Number>(before);
        auto* to = data<Number>(after);
        if (to != from) std::copy_n(from, count, to);
        return to;
    }

private:
    // ONNX Runtime gives null for what a node does not name.
    template <class Value>
    static Value* present(Value* value, const char* what, size_t index) {
        if (value == nullptr) throw Refused{what + std::to_string(index) + " is missing"};
        return value;
    }

    const Ort& ort_;
};

template <class Call>
OrtStatus* guarded(const Ort& ort, const char* name, const Call& call) {
    constexpr int FAIL = 1;
    try {
        call();
        return nullptr;
    } catch (const Refused& refused) {
        return ort.CreateStatus(FAIL, (std::string(name) + ": " + refused.why).c_str());
    } catch (const std::exception& error) {
        return ort.CreateStatus(FAIL, (std::string(name) + ": " + error.what()).c_str());
    }
}

// The operator of a Kernel, which has
//     Shared             what all kernels of a session read; it outlives them
//     NAME, INPUTS, OUTPUTS (0: one or more)
//     input_type(index), output_type(index)  an OrtElement
//     Kernel(const Ort&, const Shared*, const OrtKernelInfo*)
//     void compute(OrtKernelContext*) const
template <class Kernel>
OwnOperator<Kernel> own_operator(const Ort& ort, const typename Kernel::Shared* shared) {
    static constexpr int REQUIRED = 0, VARIADIC = 2;
    OwnOperator<Kernel> made = {};
    made.version = ORT_API_VERSION_USED;
    made.ort = &ort;
    made.shared = shared;
    made.GetName = [](const OrtCustomOp*) { return Kernel::NAME; };
    made.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
    made.GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::INPUTS; };
    made.GetInputType = [](const OrtCustomOp*, size_t index) { return static_cast<int>(Kernel::input_type(index)); };
    made.GetOutputTypeCount = [](const OrtCustomOp*) { return std::max(Kernel::OUTPUTS, size_t{1}); };
    made.GetOutputType = [](const OrtCustomOp*, size_t index) { return static_cast<int>(Kernel::output_type(index)); };
    made.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return REQUIRED; };
    made.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return Kernel::OUTPUTS == 0 ? VARIADIC : REQUIRED; };
    made.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    made.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    made.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ORT_MEMORY_DEFAULT; };
    made.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    made.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
    made.CreateKernelV2 = [](const OrtCustomOp* op, const void*, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
        const auto& own = *static_cast<const OwnOperator<Kernel>*>(op);
        return guarded(*own.ort, Kernel::NAME, [&] { *kernel = new Kernel(*own.ort, own.shared, info); });
    };
    made.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
        const auto& own = *static_cast<const Kernel*>(kernel);
        return guarded(own.ort, Kernel::NAME, [&] { own.compute(context); });
    };
    made.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return made;
}

}  // namespace framestep
