// SHA-256 (FIPS 180-4), by which a bundle's files are known.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace framestep {

// 64 lower-case hex digits.
std::string sha256_hex(std::string_view bytes);

// The same of a file's content, read in pieces. Throws Error (FS_ERROR_BUNDLE) where it cannot be read.
std::string sha256_hex(const std::filesystem::path& file);

}  // namespace framestep
