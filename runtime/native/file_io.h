// Reading and writing whole files.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"

namespace framestep {

// A file open for reading; every failure throws Error(code) with "FILE: cannot be read: REASON".
class InputFile {
public:
    InputFile(const std::filesystem::path& path, fs_status code);
    ~InputFile();
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;

    // Bytes read, fewer than `size` only at the end of the file.
    size_t read(void* data, size_t size);
    std::string read_all();

private:
    std::filesystem::path path_;
    fs_status code_;
    int descriptor_;
};

// Writes a file in one step: a reader sees the whole file or the one before. Throws Error (FS_ERROR_OUTPUT).
void write_file(const std::filesystem::path& path, const std::vector<std::string_view>& pieces);

}  // namespace framestep
