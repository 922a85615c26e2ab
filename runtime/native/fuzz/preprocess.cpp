// Frames of sizes, strides and formats as they come, in buffers that end where the frame ends. The input is a list of
// frames: sizes, format, padding, a byte to fill with.
#include "preprocess.h"

#include <cstdlib>
#include <cstring>

#include "error.h"

using namespace framestep;

namespace {

struct Bytes {
    const uint8_t* data;
    size_t size;

    uint32_t next(int count) {
        uint32_t value = 0;
        for (; count > 0 && size > 0; --count, --size) value = value << 8 | *data++;
        return value;
    }
};

// A frame of one colour stays one.
void check_colour(const Picture& picture, const uint8_t* out, size_t pixels, bool bars) {
    const bool grey = picture.format == PixelFormat::grey, bgr = picture.format == PixelFormat::bgr;
    for (size_t i = 0; i < 3 * pixels; ++i) {
        const int expected = picture.data[grey ? 0 : bgr ? 2 - i % 3 : i % 3];
        const bool is_bar = bars && out[i] == 128;
        if (!is_bar && std::abs(out[i] - expected) > 1) std::abort();
    }
}

void fit(Preprocess& preprocess, Bytes& bytes, uint8_t* out, size_t pixels, bool bars) {
    // a side of 1 to 64, or now and then of any 16 bits, or one that is refused
    auto side = [&] {
        const uint32_t kind = bytes.next(1);
        return static_cast<int32_t>(kind < 240 ? bytes.next(1) % 64 + 1 : kind < 250 ? bytes.next(2) : bytes.next(4));
    };
    const int32_t width = side(), height = side();
    Picture picture{nullptr, width, height, 0, static_cast<PixelFormat>(bytes.next(1) % 3)};
    const int64_t channels = picture.format == PixelFormat::grey ? 1 : 3;
    picture.stride = picture.width * channels + static_cast<int8_t>(bytes.next(1));
    const uint32_t colour = bytes.next(3);
    const bool sizes =
        picture.width > 0 && picture.height > 0 && picture.width <= MAX_FRAME_SIDE && picture.height <= MAX_FRAME_SIDE;
    const bool possible = sizes && picture.stride >= picture.width * channels;
    size_t size = possible ? static_cast<size_t>(picture.stride * (picture.height - 1) + picture.width * channels) : 1;
    if (size > 1 << 16) return;                             // slow
    auto* data = static_cast<uint8_t*>(std::malloc(size));  // not a byte more
    picture.data = data;
    for (size_t i = 0; possible && i < size; ++i) {
        const size_t place = i % static_cast<size_t>(picture.stride);
        data[i] = static_cast<uint8_t>(channels == 1 ? colour : colour >> (8 * (place % 3)));
    }
    try {
        preprocess.fit(picture, out);
        if (!possible) std::abort();
        check_colour(picture, out, pixels, bars);
    } catch (const Error& error) {
        if (possible || error.code != FS_ERROR_FRAME) std::abort();
    }
    std::free(data);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Bytes bytes{data, size};
    const int height = static_cast<int>(bytes.next(1) % 65), width = static_cast<int>(bytes.next(1) % 65);
    const auto resize = static_cast<Resize>(bytes.next(1) % 3);
    const auto simd = static_cast<Simd>(bytes.next(1) % (static_cast<uint32_t>(fastest_simd()) + 1));
    const auto pixels = static_cast<size_t>(height * width);
    auto* out = static_cast<uint8_t*>(std::malloc(3 * pixels + (pixels == 0)));
    try {
        Preprocess preprocess(height, width, resize, simd);
        for (int frames = 0; frames < 8 && bytes.size > 0; ++frames)
            fit(preprocess, bytes, out, pixels, resize == Resize::letterbox);
    } catch (const Error& error) {
        if (pixels != 0 || error.code != FS_ERROR_BUNDLE) std::abort();
    }
    std::free(out);
    return 0;
}
