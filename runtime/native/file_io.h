// Reading and writing whole files.
#pragma once

#include <cstddef>
#include <cstdint>
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

// A file in memory, read as it is looked at. Every failure throws Error(code), also in `bytes`, as InputFile's.
class MappedFile {
public:
    MappedFile(const std::filesystem::path& path, fs_status code);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    std::string_view bytes(uint64_t offset, uint64_t length) const;
    std::string_view bytes() const { return bytes(0, size_); }

private:
    std::filesystem::path path_;
    fs_status code_;
    void* data_ = nullptr;
    size_t size_ = 0;
};

// Writes a file in one step: a reader sees the whole file or the one before, also after a power cut. It is on the disk
// when this returns. Throws Error (FS_ERROR_OUTPUT).
void write_file(const std::filesystem::path& path, const std::vector<std::string_view>& pieces);

}  // namespace framestep
