// Tensors in the safetensors layout: eight bytes with the length of a JSON header, the header, then the raw
// little-endian tensors (https://github.com/huggingface/safetensors#format). A stream's saved state and a bundle's
// label embeddings.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace framestep {

struct TensorView {
    std::string name;
    std::string dtype;  // "float32", "float16" or "int8"
    std::vector<int64_t> shape;
    void* data;
    size_t bytes;
};

// Writes a stream's state in one step: a reader sees the whole file or the one before. Throws Error (FS_ERROR_OUTPUT).
void write_state(const std::filesystem::path& path, const std::string& state_key, int64_t position,
                 const std::vector<TensorView>& tensors);

// Reads a stream's state and returns its position. Everything is checked before a byte of `into` changes. Throws Error
// (FS_ERROR_STATE): missing, damaged, of another model, or with numbers that are not finite.
int64_t read_state(const std::filesystem::path& path, const std::string& state_key,
                   const std::vector<TensorView>& into);

struct Tensor {
    std::string name;
    std::string dtype;  // as in TensorView
    std::vector<int64_t> shape;
    std::vector<uint8_t> data;
};

// The tensors of a file of label embeddings, in the header's order. Throws Error (FS_ERROR_BUNDLE).
std::vector<Tensor> read_safetensors(const std::filesystem::path& path);

}  // namespace framestep
