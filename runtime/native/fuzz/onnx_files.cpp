// Whatever a graph names is UTF-8, sorted and there once.
#include "onnx_files.h"

#include <cstdlib>

#include "error.h"
#include "json.h"
#include "memory_file.h"

using namespace framestep;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static MemoryFile file;
    try {
        const std::vector<std::string> files = external_files(file.holding(data, size));
        for (size_t i = 0; i < files.size(); ++i) {
            if (!is_utf8(files[i]) || (i > 0 && files[i] <= files[i - 1])) std::abort();
        }
    } catch (const Error& error) {
        if (error.code != FS_ERROR_BUNDLE) std::abort();
    }
    return 0;
}
