// `RingAttention` and `IntegerRingAttention` as operators that ONNX Runtime calls.
#pragma once

#include <type_traits>

#include "own_operator.h"
#include "attention.h"
#include "ring_graph.h"

namespace framestep {

// Number: of the rings, float or int8_t.
template <class Number>
class RingKernel {
public:
    struct Shared {};
    static constexpr bool INTEGER = std::is_same_v<Number, int8_t>;
    static constexpr const char* NAME = INTEGER ? INTEGER_RING_OPERATOR : RING_OPERATOR;
    static constexpr size_t INPUTS = INTEGER ? 9 : 7, OUTPUTS = 3;
    static OrtElement input_type(size_t index);
    static OrtElement output_type(size_t index);

    RingKernel(const Ort& ort, const Shared*, const OrtKernelInfo* info);
    void compute(OrtKernelContext* context) const;

    const Ort& ort;

private:
    float scale_;
    const AttentionKernels& kernels_;
};

}  // namespace framestep
