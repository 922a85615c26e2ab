// Bringing camera frames of any size to the model's, as runtime/preprocess.py does it: bilinear with antialiasing,
// resize and crop in one pass over the frame.
#pragma once

#include <cstdint>
#include <memory>

namespace framestep {

constexpr int MAX_FRAME_SIDE = 1 << 14;  // pixels, of frames and of a model's input

enum class PixelFormat { rgb, bgr, grey };

// crop: shorter side to size, centre crop; letterbox: longer side to size, bars of grey 128.
enum class Resize { crop, stretch, letterbox };

// uint8 pixels, three bytes each, or one for grey; `stride` bytes from one row to the next.
struct Picture {
    const uint8_t* data;
    int32_t width;
    int32_t height;
    int64_t stride;
    PixelFormat format;
};

// Which instructions to compute with.
enum class Simd { baseline, avx2, avx512 };
Simd fastest_simd();  // of this processor

// Resizes frames to one size; one thread at a time.
class Preprocess {
public:
    // Throws Error (FS_ERROR_BUNDLE) for a size that is not from 1 to MAX_FRAME_SIDE.
    Preprocess(int height, int width, Resize mode, Simd simd = fastest_simd());
    ~Preprocess();
    Preprocess(Preprocess&&) noexcept;
    Preprocess& operator=(Preprocess&&) noexcept;

    // Writes the frame as RGB [height, width, 3] into `out`. Allocates only for a size that is not among the last four.
    // Throws Error (FS_ERROR_FRAME) for a size or stride that is not possible.
    void fit(const Picture& picture, uint8_t* out);

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace framestep
