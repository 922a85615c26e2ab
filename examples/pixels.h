// What cameras send, as RGB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

struct Picture {
    int width = 0;
    int height = 0;
    std::vector<uint8_t> rgb;  // three bytes a pixel, rows without a gap
};

// YUYV: two bytes a pixel, luma of each and chroma of two neighbours by turns, BT.601 in limited range (16 to 235), as
// UVC cameras send it. `width` is even, `stride` is bytes from one row to the next.
void yuyv_to_rgb(const uint8_t* yuyv, int width, int height, size_t stride, Picture& picture);

// Whether this program was built with libjpeg.
bool can_decode_jpeg();

// Decodes a JPEG into a picture of its own size. False: it is damaged or cut short, or was not expected: of another
// colour space, or beyond 16384 pixels a side; `picture` has anything then.
bool jpeg_to_rgb(const uint8_t* jpeg, size_t bytes, Picture& picture);
