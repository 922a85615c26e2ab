// Tensors that are read are as large as their shapes say.
#include <cstdlib>

#include "error.h"
#include "memory_file.h"
#include "state_file.h"

using namespace framestep;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static MemoryFile file;
    try {
        for (const Tensor& tensor : read_safetensors(file.holding(data, size))) {
            size_t bytes = tensor.dtype == "float32" ? 4 : tensor.dtype == "float16" ? 2 : 1;
            for (const int64_t extent : tensor.shape) bytes *= static_cast<size_t>(extent);
            if (bytes != tensor.data.size()) std::abort();
        }
    } catch (const Error& error) {
        if (error.code != FS_ERROR_BUNDLE) std::abort();
    }
    return 0;
}
