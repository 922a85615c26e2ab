// The camera example's conversions with a C face, for tests.
#include <algorithm>

#include "pixels.h"

extern "C" {

void convert_yuyv(const uint8_t* yuyv, int width, int height, size_t stride, uint8_t* rgb) {
    Picture picture;
    yuyv_to_rgb(yuyv, width, height, stride, picture);
    std::copy(picture.rgb.begin(), picture.rgb.end(), rgb);
}

// 1 and the size, with the pixels where they fit into `room` bytes; 0 for a JPEG that is refused.
int convert_jpeg(const uint8_t* jpeg, size_t bytes, uint8_t* rgb, size_t room, int* width, int* height) {
    Picture picture;
    if (!jpeg_to_rgb(jpeg, bytes, picture)) return 0;
    *width = picture.width;
    *height = picture.height;
    if (picture.rgb.size() <= room) std::copy(picture.rgb.begin(), picture.rgb.end(), rgb);
    return 1;
}
}
