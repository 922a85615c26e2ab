// `CachedAttention` as an operator that ONNX Runtime calls.
#pragma once

#include "attention.h"
#include "cache_graph.h"
#include "own_operator.h"

namespace framestep {

class CacheKernel {
public:
    struct Shared {};
    static constexpr const char* NAME = CACHE_OPERATOR;
    static constexpr size_t INPUTS = 10, OUTPUTS = 4;
    static OrtElement input_type(size_t index);
    static OrtElement output_type(size_t) { return ORT_FLOAT; }

    CacheKernel(const Ort& ort, const Shared*, const OrtKernelInfo* info);
    void compute(OrtKernelContext* context) const;

    const Ort& ort;

private:
    float scale_;
    const AttentionKernels& kernels_;
};

}  // namespace framestep
