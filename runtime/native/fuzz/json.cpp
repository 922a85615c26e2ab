// What is read can be written, and read again as the same.
#include "json.h"

#include <cstdlib>

#include "error.h"

using namespace framestep;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    std::string text;
    try {
        text = dump_sorted(Json::parse({reinterpret_cast<const char*>(data), size}));
    } catch (const Error& error) {
        if (error.code != FS_ERROR_BUNDLE || error.message.rfind("byte ", 0) != 0) std::abort();
        return 0;
    }
    if (!is_utf8(text) || dump_sorted(Json::parse(text)) != text) std::abort();
    return 0;
}
