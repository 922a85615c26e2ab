#include "engine_choice.h"

#include <algorithm>
#include <set>

#include "grouped_products.h"
#ifdef FRAMESTEP_TENSORRT
#include "tensorrt_engine.h"
#endif

namespace framestep {
namespace {

void check_memory(const Bundle& bundle, const Manifest& manifest, const char* why) {
    if (!manifest.has_int8_memory()) return;
    std::string others;
    for (const Manifest& other : bundle.precisions) {
        if (!other.has_int8_memory()) others += (others.empty() ? " (" : ", ") + other.precision;
    }
    throw Error(FS_ERROR_ENGINE, "precision '" + manifest.precision + "' keeps its memory as INT8, " + why + "; " +
                                     (others.empty() ? "export the bundle with another precision"
                                                     : "take another precision" + others + ")"));
}

#ifdef FRAMESTEP_TENSORRT

bool built_for_here(const Bundle& bundle) {
    if (bundle.engines.empty()) return false;
    try {
        const Target target = tensorrt_target("");
        for (const EngineFile& engine : bundle.engines) {
            if (machine_misfit(engine, target, 1).empty()) return true;
        }
    } catch (const Error&) {  // no TensorRT or no GPU
    }
    return false;
}

EngineChoice choose_tensorrt(const Bundle& bundle, const std::string& device, const std::string& precision) {
    if (device == "cpu") {
        throw Error(FS_ERROR_ENGINE, "the engine 'tensorrt' needs an NVIDIA GPU; use the engine 'onnxruntime' on a CPU");
    }
    std::set<std::string> built;
    for (const EngineFile& engine : bundle.engines) built.insert(engine.precision);
    const Manifest& manifest = bundle.choose(precision, "cuda", built);
    check_memory(bundle, manifest, "and TensorRT's caches are FP32 or FP16");
    return {"tensorrt", "cuda", &manifest};
}

#else

bool built_for_here(const Bundle&) { return false; }

EngineChoice choose_tensorrt(const Bundle&, const std::string&, const std::string&) {
    throw Error(FS_ERROR_ENGINE, "engine 'tensorrt' was not built into this library; build it where the headers of TensorRT"
                                 " 10.15 or later and of CUDA are, with -DFRAMESTEP_TENSORRT=ON");
}

#endif

// Whether a precision has INT8 memory, and a CPU reads it, which it does beside float32 alone.
bool reads_int8_memory(const Manifest& manifest) {
    return manifest.has_int8_memory() && manifest.precision.rfind("fp16", 0) != 0;
}

EngineChoice choose_bfloat16(const Bundle& bundle, const std::string& device, const std::string& precision) {
    const std::string name = std::string("the engine '") + BFLOAT16 + "' ";
    if (device == "cuda") throw Error(FS_ERROR_ENGINE, name + "is for CPUs; on a GPU use precision fp16");
    if (bfloat16_kernels() == nullptr) {
        throw Error(FS_ERROR_ENGINE, name + "needs AVX512-BF16, which this processor does not have; use 'onnxruntime'");
    }
    const auto is_float = [](const Manifest& each) { return each.precision == "fp32" || each.precision == "fp32+kv8"; };
    const auto own = bundle.precisions.begin(), end = bundle.precisions.end();
    const auto plain = std::find_if(own, end, [](const Manifest& each) { return each.precision == "fp32"; });
    const Manifest& manifest = precision != "auto" ? bundle.at(precision)
                               : is_float(*own)    ? *own
                               : plain != end      ? *plain
                                                   : bundle.choose("auto", "cpu");
    if (!is_float(manifest)) {
        throw Error(FS_ERROR_ENGINE,
                    name + "computes the precisions fp32 and fp32+kv8 in bfloat16, not '" + manifest.precision + "'");
    }
    return {BFLOAT16, "cpu", &manifest};
}

}  // namespace

EngineChoice choose_engine(const Bundle& bundle, const std::string& engine, const std::string& device,
                           const std::string& precision, const std::string& library) {
    if (engine != "auto" && engine != "onnxruntime" && engine != PLAIN && engine != BFLOAT16 && engine != "tensorrt") {
        throw Error(FS_ERROR_ARGUMENT, "engine '" + engine + "' is unknown; expected auto, onnxruntime, " + PLAIN + ", " +
                                           BFLOAT16 + " or tensorrt");
    }
    if (device != "auto" && device != "cpu" && device != "cuda") {
        throw Error(FS_ERROR_ARGUMENT, "device '" + device + "' is unknown; expected auto, cpu or cuda");
    }
    if (engine == "tensorrt" || (engine == "auto" && device != "cpu" && built_for_here(bundle))) {
        return choose_tensorrt(bundle, device, precision);
    }
    if (engine == BFLOAT16) return choose_bfloat16(bundle, device, precision);
    const std::string taken = device != "auto" ? device : onnxruntime_has_device(library, "cuda") ? "cuda" : "cpu";
    const Manifest& own = bundle.precisions.front();
    if (engine != PLAIN && taken == "cpu" && precision == "auto" && reads_int8_memory(own)) {
        return {"onnxruntime", taken, &own};  // nobody makes such a bundle who does not want it
    }
    const Manifest& manifest = bundle.choose(precision, taken);
    if (engine == PLAIN || taken != "cpu") {
        check_memory(bundle, manifest, "which ONNX Runtime would dequantize as a whole in every step");
    }
    return {engine == PLAIN ? PLAIN : "onnxruntime", taken, &manifest};
}

std::unique_ptr<Engine> make_engine(const Bundle& bundle, const Manifest& manifest, const Plan& plan,
                                    const EngineOptions& options) {
#ifdef FRAMESTEP_TENSORRT
    if (options.engine == "tensorrt") return make_tensorrt_engine(bundle, manifest, plan, options);
#endif
    return make_onnxruntime_engine(bundle, manifest, plan, options);
}

}  // namespace framestep
