// A state is read whole, or refused with nothing changed.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "error.h"
#include "memory_file.h"
#include "state_file.h"

using namespace framestep;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static MemoryFile file;
    float keys[6];
    uint16_t values[5];
    int8_t scales[3];
    std::memset(keys, 77, sizeof keys);
    std::memset(values, 77, sizeof values);
    std::memset(scales, 77, sizeof scales);
    const std::vector<TensorView> into = {{"keys", "float32", {2, 3}, keys, sizeof keys},
                                          {"values", "float16", {5}, values, sizeof values},
                                          {"scales", "int8", {3}, scales, sizeof scales}};
    try {
        const int64_t position = read_state(file.holding(data, size), "key", into);
        if (position < 0 || position > int64_t{1} << 62) std::abort();
        for (const float number : keys) {
            if (!std::isfinite(number)) std::abort();
        }
    } catch (const Error& error) {
        if (error.code != FS_ERROR_STATE) std::abort();
        for (const TensorView& tensor : into) {
            const auto* bytes = static_cast<const uint8_t*>(tensor.data);
            for (size_t i = 0; i < tensor.bytes; ++i) {
                if (bytes[i] != 77) std::abort();
            }
        }
    }
    return 0;
}
