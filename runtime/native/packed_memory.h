// Memory that holds a constant in the order in which a kernel reads it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace framestep {

class PackedMemory {
public:
    explicit PackedMemory(size_t bytes) {
        const size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : LINE;
        data_.reset(static_cast<uint8_t*>(std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)));
        if (data_ == nullptr) throw std::bad_alloc();
        if (alignment == HUGE_PAGE) madvise(data_.get(), bytes, MADV_HUGEPAGE);  // a wish
    }

    uint8_t* data() const { return data_.get(); }

private:
    static constexpr size_t LINE = 64, HUGE_PAGE = 2u << 20;  // bytes

    struct Free {
        void operator()(uint8_t* data) const { std::free(data); }
    };
    std::unique_ptr<uint8_t[], Free> data_;
};

}  // namespace framestep
