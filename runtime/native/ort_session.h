// Sessions of ONNX Runtime: their options, and a model that copies.
#pragma once

#include <string>
#include <utility>

#include "engine.h"
#include "ort_api.h"

namespace framestep {

// An object of ONNX Runtime's, released with it.
template <class T>
class Owned {
public:
    Owned() = default;
    explicit Owned(void (*release)(T*)) : release_(release) {}
    Owned(Owned&& other) noexcept : object_(std::exchange(other.object_, nullptr)), release_(other.release_) {}
    Owned& operator=(Owned&& other) noexcept {
        std::swap(object_, other.object_);
        std::swap(release_, other.release_);
        return *this;
    }
    ~Owned() {
        if (object_ != nullptr) release_(object_);
    }

    T* get() const { return object_; }
    T** into() { return &object_; }

private:
    T* object_ = nullptr;
    void (*release_)(T*) = nullptr;
};

int element_of(fs_dtype dtype);  // an OrtElement

// `integer`: for a graph that was calibrated to integers.
Owned<OrtSessionOptions> session_options(const Ort& ort, const EngineOptions& engine, bool integer);

// An ONNX model of one Identity, float16 or another type, one axis of any size: y = x. It moves memory from and to a
// device, for which the C interface has nothing else.
std::string identity_model(int element);

}  // namespace framestep
