#include "pixels.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>  // before jpeglib.h, which needs FILE

#ifdef EXAMPLES_HAVE_JPEG
#include <jerror.h>
#include <jpeglib.h>
#endif

namespace {

uint8_t to_byte(int fixed) {
    constexpr int HALF = 1 << 15;
    return static_cast<uint8_t>(std::clamp((fixed + HALF) >> 16, 0, 255));
}

void resize(Picture& picture, int width, int height) {
    picture.width = width;
    picture.height = height;
    picture.rgb.resize(static_cast<size_t>(width) * height * 3);
}

}  // namespace

// ITU-R BT.601: R = 1.164 (Y - 16) + 1.596 (V - 128), and so on; here in units of 2^-16.
void yuyv_to_rgb(const uint8_t* yuyv, int width, int height, size_t stride, Picture& picture) {
    constexpr int LUMA = 76309, RED_OF_V = 104597, GREEN_OF_U = 25675, GREEN_OF_V = 53279, BLUE_OF_U = 132201;
    resize(picture, width, height);
    uint8_t* out = picture.rgb.data();
    for (int y = 0; y < height; ++y) {
        const uint8_t* in = yuyv + y * stride;
        for (int x = 0; x < width; x += 2, in += 4) {
            const int u = in[1] - 128, v = in[3] - 128;
            for (const int luma : {LUMA * (in[0] - 16), LUMA * (in[2] - 16)}) {
                *out++ = to_byte(luma + RED_OF_V * v);
                *out++ = to_byte(luma - GREEN_OF_U * u - GREEN_OF_V * v);
                *out++ = to_byte(luma + BLUE_OF_U * u);
            }
        }
    }
}

#ifdef EXAMPLES_HAVE_JPEG

bool can_decode_jpeg() { return true; }

namespace {

constexpr int MAX_SIDE = 16384;  // of a frame, see framestep.h

// libjpeg's errors, which may not return to it.
struct Failure {
    jpeg_error_mgr manager;
    std::jmp_buf back;
};

void leave(j_common_ptr decoder) { std::longjmp(reinterpret_cast<Failure*>(decoder->err)->back, 1); }

// Warnings of a frame that was cut short or changed on its way, which libjpeg would fill with grey. Others are harmless:
// many cameras put bytes between their frames' segments.
void on_message(j_common_ptr decoder, int level) {
    switch (decoder->err->msg_code) {
        case JWRN_JPEG_EOF:
        case JWRN_HIT_MARKER:
        case JWRN_HUFF_BAD_CODE:
        case JWRN_MUST_RESYNC:
            if (level < 0) leave(decoder);
    }
}

}  // namespace

bool jpeg_to_rgb(const uint8_t* jpeg, size_t bytes, Picture& picture) {
    jpeg_decompress_struct decoder{};
    Failure failure;
    decoder.err = jpeg_std_error(&failure.manager);
    failure.manager.error_exit = leave;
    failure.manager.emit_message = on_message;
    if (setjmp(failure.back) != 0) {  // nothing between here and a longjmp has a destructor
        jpeg_destroy_decompress(&decoder);
        return false;
    }
    jpeg_create_decompress(&decoder);
    jpeg_mem_src(&decoder, jpeg, bytes);
    jpeg_read_header(&decoder, TRUE);
    const bool possible = decoder.image_width <= MAX_SIDE && decoder.image_height <= MAX_SIDE &&
                          (decoder.jpeg_color_space == JCS_YCbCr || decoder.jpeg_color_space == JCS_GRAYSCALE);
    if (!possible) leave(reinterpret_cast<j_common_ptr>(&decoder));
    decoder.out_color_space = JCS_RGB;
    jpeg_start_decompress(&decoder);
    resize(picture, decoder.output_width, decoder.output_height);
    while (decoder.output_scanline < decoder.output_height) {
        JSAMPROW row = picture.rgb.data() + size_t{3} * decoder.output_width * decoder.output_scanline;
        jpeg_read_scanlines(&decoder, &row, 1);
    }
    jpeg_finish_decompress(&decoder);
    jpeg_destroy_decompress(&decoder);
    return true;
}

#else

bool can_decode_jpeg() { return false; }

bool jpeg_to_rgb(const uint8_t*, size_t, Picture&) { return false; }

#endif
