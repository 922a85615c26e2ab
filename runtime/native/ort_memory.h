// Memory that an engine on ONNX Runtime binds: of the host, or of a device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "manifest.h"
#include "ort_api.h"

namespace framestep {

constexpr size_t ALIGNMENT = 64;        // bytes: a cache line

// Zeroed memory that starts on a cache line; of the host, or of a device through ONNX Runtime's allocator.
class Memory {
public:
    Memory() = default;
    explicit Memory(size_t bytes) : bytes_(bytes) {
        const size_t rounded = std::max(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
        data_ = rounded < bytes ? nullptr : std::aligned_alloc(ALIGNMENT, rounded);
        if (data_ == nullptr) fail("the host");
        std::memset(data_, 0, rounded);
    }
    Memory(const Ort& ort, OrtAllocator* allocator, size_t bytes) : bytes_(bytes), ort_(&ort), allocator_(allocator) {
        OrtStatus* status = ort.AllocatorAlloc(allocator, std::max(ALIGNMENT, bytes), &data_);
        if (status != nullptr) ort.ReleaseStatus(status);
        if (status != nullptr || data_ == nullptr) fail("the device");
    }
    Memory(Memory&& other) noexcept { *this = std::move(other); }
    Memory& operator=(Memory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        std::swap(ort_, other.ort_);
        std::swap(allocator_, other.allocator_);
        return *this;
    }
    ~Memory() {
        if (data_ == nullptr) return;
        if (allocator_ == nullptr) {
            std::free(data_);
        } else if (OrtStatus* status = ort_->AllocatorFree(allocator_, data_)) {
            ort_->ReleaseStatus(status);
        }
    }

    uint8_t* data() const { return static_cast<uint8_t*>(data_); }
    size_t bytes() const { return bytes_; }

private:
    [[noreturn]] void fail(const char* where) const {
        throw Error(FS_ERROR_MEMORY, std::string("no memory on ") + where + " for a buffer of " + std::to_string(bytes_) +
                                         " bytes; open the session with fewer streams");
    }

    void* data_ = nullptr;
    size_t bytes_ = 0;
    const Ort* ort_ = nullptr;
    OrtAllocator* allocator_ = nullptr;
};

// A tensor in memory. Its first axis is that of the slots where it has a row for each.
struct Buffer {
    Memory memory;
    std::vector<int64_t> shape;
    fs_dtype dtype = FS_FLOAT32;
    bool of_slots = false;
    bool on_device = false;

    size_t row() const {  // bytes of a slot
        size_t total = bytes_of(dtype);
        for (size_t axis = 1; axis < shape.size(); ++axis) total *= static_cast<size_t>(shape[axis]);
        return total;
    }
};

}  // namespace framestep
