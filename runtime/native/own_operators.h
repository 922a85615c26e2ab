// The operators of ours that a session on a CPU has, and the graphs that they stand in.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "manifest.h"
#include "ort_api.h"

namespace framestep {

struct DerivedGraph {
    std::string model;     // the bytes of a file; "" where the bundle's graph is run as it is
    size_t operators = 0;  // rings, caches and products that operators of ours take
    size_t integer_rings = 0;  // INT8 states that they read as they are
};

// Outlives the sessions that have it.
class OwnOperators {
public:
    explicit OwnOperators(const Ort& ort);
    ~OwnOperators();
    OwnOperators(const OwnOperators&) = delete;
    OwnOperators& operator=(const OwnOperators&) = delete;

    // For the options of sessions.
    OrtCustomOpDomain* domain() const;

    // What to run in the place of a bundle's graph, whose file it reads. `bfloat16`: products of float32 are computed in it;
    // the processor has to have kernels for that. Throws Error.
    DerivedGraph derive(const Bundle& bundle, const Manifest& manifest, const Graph& graph, bool bfloat16);

    // Whether a graph so far has products in bfloat16.
    bool has_bfloat16() const;

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace framestep
