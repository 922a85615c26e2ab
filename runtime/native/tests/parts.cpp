// The inner parts of the library as C functions, for tests/native/test_native_parts.py and
// benchmarks/native_preprocess.py. A function returns an fs_status; the text behind `text`, a result or a message, is
// freed with parts_free.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <string>
#include <thread>

#include "attention.h"
#include "block_products.h"
#include "cache_graph.h"
#include "cores.h"
#include "engine_files.h"
#include "error.h"
#include "file_io.h"
#include "grouped_products.h"
#include "json.h"
#include "onnx_files.h"
#include "own_operator.h"
#include "preprocess.h"
#include "product_graph.h"
#include "protobuf.h"
#include "ring_graph.h"
#include "sha256.h"
#include "state_file.h"

using namespace framestep;

namespace {

size_t allocations = 0;

template <typename Function>
int call(char** text, Function function) {
    std::string result;
    int status = FS_OK;
    try {
        result = function();
    } catch (const Error& error) {
        result = error.message;
        status = error.code;
    }
    *text = static_cast<char*>(std::malloc(result.size() + 1));
    std::memcpy(*text, result.c_str(), result.size() + 1);
    return status;
}

struct View {  // as in the test
    const char* name;
    const char* dtype;
    const int64_t* shape;
    size_t rank;
    void* data;
    size_t bytes;
};

std::vector<TensorView> views_of(const View* views, size_t count) {
    std::vector<TensorView> tensors;
    for (size_t i = 0; i < count; ++i) {
        const View& view = views[i];
        tensors.push_back({view.name, view.dtype, {view.shape, view.shape + view.rank}, view.data, view.bytes});
    }
    return tensors;
}

std::string hex(const std::vector<uint8_t>& bytes) {
    std::string text;
    for (const uint8_t byte : bytes) text += {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
    return text;
}

template <class Matrix>
void round_in_parts(const ProductKernels<Matrix>& kernels, const Matrix& matrix, const float* x, int64_t rows,
                    typename Matrix::Number* rounded) {
    kernels.round(matrix, x, 0, rows / 2, rounded);
    kernels.round(matrix, x, rows / 2, rows, rounded);
}

template <class Matrix>
void multiply_in_parts(const ProductKernels<Matrix>& kernels, const Matrix& matrix, const typename Matrix::Number* x,
                       int64_t rows, int64_t part, float* y) {
    for (int64_t first = 0; first < matrix.groups(); first += part) {
        kernels.multiply(matrix, x, rows, first, std::min(first + part, matrix.groups()), y);
    }
}

}  // namespace

void* operator new(size_t size) {
    ++allocations;
    if (void* memory = std::malloc(size)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

#pragma GCC visibility push(default)
extern "C" {

void parts_free(void* memory) { std::free(memory); }

size_t parts_allocations() { return allocations; }

int parts_json(const char* bytes, size_t size, size_t max_depth, char** text) {
    return call(text, [&] { return dump_sorted(Json::parse({bytes, size}, max_depth)); });
}

int parts_sha256_bytes(const char* bytes, size_t size, char** text) {
    return call(text, [&] { return sha256_hex(std::string_view(bytes, size)); });
}

int parts_sha256_file(const char* path, char** text) {
    return call(text, [&] { return sha256_hex(std::filesystem::path(path)); });
}

int parts_fastest_simd() { return static_cast<int>(fastest_simd()); }

int parts_preprocess_open(int height, int width, int resize, int simd, Preprocess** preprocess, char** text) {
    return call(text, [&] {
        *preprocess = new Preprocess(height, width, static_cast<Resize>(resize), static_cast<Simd>(simd));
        return std::string();
    });
}

void parts_preprocess_close(Preprocess* preprocess) { delete preprocess; }

int parts_preprocess_fit(Preprocess* preprocess, const uint8_t* data, int width, int height, int64_t stride, int format,
                         uint8_t* out, char** text) {
    try {
        preprocess->fit({data, width, height, stride, static_cast<PixelFormat>(format)}, out);
        return FS_OK;
    } catch (const Error& error) {
        return call(text, [&]() -> std::string { throw error; });
    }
}

int parts_write_state(const char* path, const char* key, int64_t position, const View* views, size_t count,
                      char** text) {
    return call(text, [&] {
        write_state(path, key, position, views_of(views, count));
        return std::string();
    });
}

int parts_read_state(const char* path, const char* key, const View* views, size_t count, char** text) {
    return call(text, [&] { return std::to_string(read_state(path, key, views_of(views, count))); });
}

// A JSON list of [name, dtype, shape, data in hex].
int parts_safetensors(const char* path, char** text) {
    return call(text, [&] {
        Json::Array list;
        for (const Tensor& tensor : read_safetensors(path)) {
            Json::Array shape;
            for (const int64_t extent : tensor.shape) shape.emplace_back(extent);
            list.emplace_back(Json::Array{Json(tensor.name), Json(tensor.dtype), Json(shape), Json(hex(tensor.data))});
        }
        return dump_sorted(Json(list));
    });
}

// A JSON list.
int parts_external_files(const char* path, char** text) {
    return call(text, [&] {
        Json::Array list;
        for (const std::string& location : external_files(path)) list.emplace_back(location);
        return dump_sorted(Json(list));
    });
}

void parts_ring_attention(int simd, const float* query, const float* new_key, const float* new_value, float* key,
                          float* value, float* result, const uint8_t* visible, int64_t rows, int64_t window, int64_t width,
                          int64_t slot, float scale) {
    std::vector<float> scratch(ring_attention_scratch(window));
    const RingAttention<float> ring = {query,  new_key, new_value, key,   value, nullptr, nullptr,
                                       result, visible, window,    width, slot,  scale};
    attention_with(static_cast<Simd>(simd)).ring(ring, 0, rows / 2, scratch.data());
    attention_with(static_cast<Simd>(simd)).ring(ring, rows / 2, rows, scratch.data());
}

void parts_integer_ring_attention(int simd, const float* query, const float* new_key, const float* new_value, int8_t* key,
                                  int8_t* value, const float* key_scale, const float* value_scale, float* result,
                                  const uint8_t* visible, int64_t rows, int64_t window, int64_t width, int64_t slot,
                                  float scale) {
    std::vector<float> scratch(ring_attention_scratch(window));
    const RingAttention<int8_t> ring = {query,  new_key, new_value, key,   value, key_scale, value_scale,
                                        result, visible, window,    width, slot,  scale};
    attention_with(static_cast<Simd>(simd)).integer_ring(ring, 0, rows / 2, scratch.data());
    attention_with(static_cast<Simd>(simd)).integer_ring(ring, rows / 2, rows, scratch.data());
}

void parts_cached_attention(int simd, const float* query, const float* cosines, const float* sines, const float* key,
                            const float* value, float* result, const uint8_t* visible, int64_t heads, int64_t slots,
                            int64_t width, float scale) {
    std::vector<float> scratch(cached_attention_scratch(slots, width));
    attention_with(static_cast<Simd>(simd)).cached({query, cosines, sines, key, value, result, visible, heads, slots, width, scale},
                                                   scratch.data());
}

void parts_chunk_attention(int simd, const float* query, const float* cosines, const float* sines, const float* key,
                           const float* value, float* result, const uint8_t* visible, int64_t token_stride, int64_t tokens,
                           int64_t heads, int64_t slots, int64_t width, float scale) {
    const AttentionKernels& kernels = attention_with(static_cast<Simd>(simd));
    std::vector<float> packed(static_cast<size_t>(padded(slots) * width), NAN);
    for (int64_t first = 0; first < padded(slots); first += 16) {
        kernels.pack_keys(key, slots, width, first, first + 16, packed.data());
    }
    std::vector<float> scratch(chunk_attention_scratch(slots, width), NAN);
    kernels.chunk({query, cosines, sines, packed.data(), value, result, visible, token_stride, tokens, heads, slots, width,
                   scale}, scratch.data());
}

int parts_multiplies_blocks(int simd) { return block_kernels_with(static_cast<BlockSimd>(simd)) != nullptr; }

// y = x matrix + bias, in parts of so many groups.
void parts_multiply(int simd, int bits, int64_t inputs, int64_t outputs, int64_t block, const uint8_t* integers,
                    const float* scales, const float* bias, const float* x, int64_t rows, int64_t part, int8_t* x_integers,
                    float* y) {
    const BlockKernels& kernels = *block_kernels_with(static_cast<BlockSimd>(simd));
    const PackedMatrix matrix({bits, inputs, outputs, block, integers, scales, bias});
    std::vector<float> row_scales(static_cast<size_t>(rows * inputs / block));
    std::vector<int32_t> sums(row_scales.size());
    const IntegerRows quantized = {x_integers, row_scales.data(), sums.data()};
    kernels.quantize(x, inputs, block, 0, rows / 2, quantized);
    kernels.quantize(x, inputs, block, rows / 2, rows, quantized);
    for (int64_t first = 0; first < matrix.groups(); first += part) {
        kernels.multiply(matrix, quantized, rows, first, std::min(first + part, matrix.groups()), y);
    }
}

// Of the processors 0 to `processors` - 1.
int parts_default_threads(int processors, const char* root) {
    std::vector<int> numbers(static_cast<size_t>(processors));
    std::iota(numbers.begin(), numbers.end(), 0);
    return default_threads(numbers, root);
}

int parts_multiplies_floats() { return float_kernels() != nullptr; }
int parts_multiplies_bfloat16() { return bfloat16_kernels() != nullptr; }
int parts_multiplies_integers(int simd) { return integer_kernels_with(static_cast<IntegerSimd>(simd)) != nullptr; }

// y = x matrix + bias, and its GELU, in parts of so many groups; the matrix may be stored `transposed`.
void parts_multiply_floats(int64_t inputs, int64_t outputs, int transposed, const float* matrix, const float* bias, int gelu,
                           const float* x, int64_t rows, int64_t part, float* y) {
    const auto bytes = static_cast<size_t>(inputs * outputs) * sizeof(float);
    const FloatMatrix packed({reinterpret_cast<const char*>(matrix), bytes}, inputs, outputs, transposed != 0,
                              {bias, gelu != 0});
    multiply_in_parts(*float_kernels(), packed, x, rows, part, y);
}

// The same; `rounded` are x as they were rounded.
void parts_multiply_bfloat16(int64_t inputs, int64_t outputs, int transposed, const float* matrix, const float* bias,
                              int gelu, const float* x, int64_t rows, int64_t part, uint16_t* rounded, float* y) {
    const auto bytes = static_cast<size_t>(inputs * outputs) * sizeof(float);
    const Bfloat16Matrix packed({reinterpret_cast<const char*>(matrix), bytes}, inputs, outputs, transposed != 0,
                              {bias, gelu != 0});
    round_in_parts(*bfloat16_kernels(), packed, x, rows, rounded);
    multiply_in_parts(*bfloat16_kernels(), packed, rounded, rows, part, y);
}

// The same of integers with a scale for each output.
void parts_multiply_integers(int simd, int64_t inputs, int64_t outputs, const int8_t* matrix, const float* bias, int gelu,
                             const float* x, int64_t rows, int64_t part, int8_t* rounded, float* y, float input_scale,
                             const float* scales) {
    const auto bytes = static_cast<size_t>(inputs * outputs);
    const IntegerMatrix packed({reinterpret_cast<const char*>(matrix), bytes}, inputs, outputs, input_scale, scales,
                               {bias, gelu != 0});
    const ProductKernels<IntegerMatrix>& kernels = *integer_kernels_with(static_cast<IntegerSimd>(simd));
    round_in_parts(kernels, packed, x, rows, rounded);
    multiply_in_parts(kernels, packed, rounded, rows, part, y);
}

// What a kernel's call gives when a thread of ONNX Runtime's, for which one stands here, gets no memory in it.
int parts_kernel_without_memory(char** text) {
    Ort ort;
    ort.KernelContext_ParallelFor = [](const OrtKernelContext*, void (*each)(void*, size_t), size_t total, size_t,
                                       void* user) -> OrtStatus* {
        std::thread([=] {
            for (size_t index = 0; index < total; ++index) each(user, index);
        }).join();
        return nullptr;
    };
    return call(text, [&]() -> std::string {
        try {
            KernelCalls(ort).parallel(nullptr, 3, [](int64_t index) {
                if (index == 1) throw std::bad_alloc();
            });
            return "";
        } catch (const std::bad_alloc& error) {
            return error.what();
        }
    });
}

// Writes the derived graph to `out`; the text is "none" where there is none. `rings` (of floats or integers), `caches` and `products` (those of
// "integers" and "floats", beside those of blocks) are separated by commas.
int parts_derived_graph(const char* path, const char* rings, const char* caches, const char* products, const char* out,
                        char** text) {
    const auto names = [](const std::string& all) {
        std::set<std::string> found;
        for (std::string left = all; !left.empty();) {
            const size_t comma = left.find(',');
            found.insert(left.substr(0, comma));
            left = comma == std::string::npos ? "" : left.substr(comma + 1);
        }
        return found;
    };
    return call(text, [&]() -> std::string {
        const std::string model = InputFile(path, FS_ERROR_BUNDLE).read_all();
        try {
            OnnxGraph graph(model);
            replace_ring_attention(graph, {names(rings), names(rings)});
            replace_cached_attention(graph, names(caches));
            replace_block_products(graph, 0);
            if (names(products).count("integers") != 0) replace_integer_products(graph, 0);
            if (names(products).count("floats") != 0) replace_float_products(graph, 0, true);
            const std::string derived = graph.write();
            if (derived.empty()) return "none";
            write_file(out, {derived});
            return "";
        } catch (const ProtobufDamaged&) {
            return "none";
        }
    });
}

// The engine of a graph that fits a machine with TensorRT: its file, checked.
int parts_find_engine(const char* path, const char* precision, const char* graph, const char* version,
                      const char* compute_capability, int streams, char** text) {
    return call(text, [&] {
        const Bundle bundle = Bundle::open(path, "", true);
        const Manifest& manifest = bundle.at(precision);
        const auto found = std::find_if(manifest.graphs.begin(), manifest.graphs.end(),
                                        [&](const Graph& one) { return one.name == graph; });
        const Target target{"tensorrt", version, compute_capability};
        const EngineFile& engine = find_engine(bundle, manifest, *found, target, streams);
        read_engine(bundle, engine);
        return engine.file;
    });
}

}  // extern "C"
#pragma GCC visibility pop
