#include "ort_session.h"

#include <cstring>

#include "processor.h"

namespace framestep {
namespace {

// MatMulAddFusion makes a Gemm with a float bias, which is no integer product; CommonSubexpressionElimination merges the
// quantizers of layers that share an input, and a shared one is not fused. Such layers would run in float.
constexpr const char* BREAK_INTEGER_PRODUCTS = "MatMulAddFusion;CommonSubexpressionElimination";

}  // namespace

int element_of(fs_dtype dtype) {
    switch (dtype) {
        case FS_UINT8: return ORT_UINT8;
        case FS_INT8: return ORT_INT8;
        case FS_INT32: return ORT_INT32;
        case FS_INT64: return ORT_INT64;
        case FS_BOOL: return ORT_BOOL;
        case FS_FLOAT16: return ORT_FLOAT16;
        case FS_FLOAT32: return ORT_FLOAT;
    }
    return 0;
}

Owned<OrtSessionOptions> session_options(const Ort& ort, const EngineOptions& engine, bool integer) {
    Owned<OrtSessionOptions> options(ort.ReleaseSessionOptions);
    const std::string what = "ONNX Runtime's options";
    const auto entry = [&](const char* key, const char* value) {
        ort.check(ort.AddSessionConfigEntry(options.get(), key, value), what);
    };
    ort.check(ort.CreateSessionOptions(options.into()), what);
    ort.check(ort.SetIntraOpNumThreads(options.get(), engine.threads), what);
    ort.check(ort.SetInterOpNumThreads(options.get(), 1), what);  // a step graph is a chain: nothing runs side by side
    ort.check(ort.SetSessionExecutionMode(options.get(), ORT_SEQUENTIAL), what);
    ort.check(ort.SetSessionGraphOptimizationLevel(options.get(), ORT_ENABLE_ALL), what);
    ort.check(ort.SetSessionLogSeverityLevel(options.get(), ORT_WARNING), what);
    // spin between operators, where a wake-up would cost more than it saves, but not between frames
    entry("session.intra_op.allow_spinning", "1");
    entry("session.force_spinning_stop", "1");
    // weights in blocks of integers: multiply integers (4), not floats; only such layers are concerned
    entry("session.qdq_matmulnbits_accuracy_level", "4");
    if (integer) entry("optimization.disable_specified_optimizers", BREAK_INTEGER_PRODUCTS);
    // it rewrites integers in blocks too, wrongly
    if (integer && !has_exact_int8_products()) entry("session.x64quantprecision", "1");
    if (engine.device == "cuda") {
        Owned<OrtCudaOptions> cuda(ort.ReleaseCUDAProviderOptions);
        ort.check(ort.CreateCUDAProviderOptions(cuda.into()), "ONNX Runtime could not use CUDA");
        // unless told otherwise it rounds the factors of float32 products to 10 bits
        const char *const keys[] = {"use_tf32"}, *const values[] = {"0"};
        ort.check(ort.UpdateCUDAProviderOptions(cuda.get(), keys, values, 1), "ONNX Runtime could not use CUDA");
        ort.check(ort.SessionOptionsAppendExecutionProvider_CUDA_V2(options.get(), cuda.get()),
                  "ONNX Runtime could not use CUDA");
    }
    return options;
}

std::string identity_model(int element) {
    const auto field = [](int number, const std::string& content) {
        return std::string(1, static_cast<char>(number << 3 | 2)) + static_cast<char>(content.size()) + content;
    };
    const auto value = [&](int number, const char* name) {
        const std::string shape = field(2, field(1, field(2, "n")));
        const std::string type = field(1, std::string("\x08") + static_cast<char>(element) + shape);
        return field(number, field(1, name) + field(2, type));
    };
    const std::string node = field(1, field(1, "x") + field(2, "y") + field(4, "Identity"));
    const std::string graph = node + field(2, "copy") + value(11, "x") + value(12, "y");
    return std::string("\x08\x08") + field(7, graph) + field(8, field(1, "") + "\x10\x0d");  // IR 8, opset 13
}

bool onnxruntime_has_device(const std::string& library, const std::string& device) {
    const Ort& ort = load_ort(library);
    if (device == "cpu") return true;
    char** names = nullptr;
    int count = 0;
    ort.check(ort.GetAvailableProviders(&names, &count), "ONNX Runtime's providers");
    bool built_in = false;  // it says what it was built with, whether there is a GPU or not
    for (int index = 0; index < count; ++index) built_in |= std::strcmp(names[index], "CUDAExecutionProvider") == 0;
    ort.check(ort.ReleaseAvailableProviders(names, count), "ONNX Runtime's providers");
    if (!built_in) return false;
    try {
        EngineOptions engine;
        engine.device = device;
        const Owned<OrtSessionOptions> options = session_options(ort, engine, false);
        Owned<OrtNativeSession> session(ort.ReleaseSession);
        const std::string model = identity_model(ORT_FLOAT);
        ort.check(ort.CreateSessionFromArray(ort.env, model.data(), model.size(), options.get(), session.into()), "CUDA");
        return true;
    } catch (const Error&) {
        return false;  // no GPU, no driver, or one that does not fit
    }
}

}  // namespace framestep
