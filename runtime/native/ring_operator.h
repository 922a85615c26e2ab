// `RingAttention` as an operator that ONNX Runtime calls.
#pragma once

#include "own_operator.h"
#include "attention.h"
#include "ring_graph.h"

namespace framestep {

class RingKernel {
public:
    struct Shared {};
    static constexpr const char* NAME = RING_OPERATOR;
    static constexpr size_t INPUTS = 7, OUTPUTS = 3;
    static OrtElement input_type(size_t index);

    RingKernel(const Ort& ort, const Shared*, const OrtKernelInfo* info);
    void compute(OrtKernelContext* context) const;

    const Ort& ort;

private:
    float scale_;
    const AttentionKernels& kernels_;
};

}  // namespace framestep
