// `RingAttention` as an operator that ONNX Runtime calls.
#pragma once

#include "ort_api.h"

namespace framestep {

// The operator, in ONNX Runtime's layout; must live as long as the sessions that have it.
const OrtCustomOp* ring_operator(const Ort& ort);

}  // namespace framestep
