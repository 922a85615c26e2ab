// A TensorRT without a GPU, for the rehearsal. An engine's file says which tensors it has, one a line: name, type as a number,
// "in" or "out", numbers in a row of one slot, and the input whose memory an output shares, or "-". One that takes frames sums
// up the first pixels of the last eight, which it keeps in `layer0.key`; one that takes `pooled` adds those of the labels.
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "stand_in.h"
#include "stubs.h"

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr int WINDOW = 8;
constexpr size_t SCRATCH = 4096;  // bytes that an engine claims to need

struct Tensor {
    DataType type;
    bool input;
    size_t row;
    std::string alias;  // empty: none
};
using Tensors = std::map<std::string, Tensor>;

size_t bytes_of(DataType type) { return type == DataType::kINT64 ? 8 : type == DataType::kFLOAT ? 4 : 1; }

void must(bool condition, const std::string& what) {
    if (condition) return;
    std::fprintf(stderr, "the stand-in for TensorRT: %s\n", what.c_str());
    std::abort();
}

struct Run {
    Tensors tensors;
    std::map<std::string, void*> addresses;
    std::map<std::string, Dims> shapes;
};

float& number(const Run& run, const std::string& name, size_t at) { return static_cast<float*>(run.addresses.at(name))[at]; }

void fill(const Run& run, size_t slot, float value) {
    for (const auto& [name, tensor] : run.tensors) {
        const bool state = name.rfind("layer", 0) == 0;
        for (size_t at = 0; !tensor.input && !state && at < tensor.row; ++at) number(run, name, slot * tensor.row + at) = value;
    }
}

// What a real engine would do when its turn comes on the stream.
void carry_out(void* argument) {
    const Run& run = *static_cast<Run*>(argument);
    if (run.tensors.count("frame") == 0) {
        const auto labels = static_cast<size_t>(run.shapes.at("text_embeddings").d[0]);
        const auto streams = static_cast<size_t>(run.shapes.at("pooled").d[0]);
        const size_t row = run.tensors.at("pooled").row, width = run.tensors.at("text_embeddings").row;
        for (size_t slot = 0; slot < streams; ++slot) {
            for (size_t label = 0; label < labels; ++label) {
                number(run, "scores", slot * labels + label) =
                    number(run, "pooled", slot * row) + number(run, "text_embeddings", label * width);
            }
        }
        return;
    }
    const auto streams = static_cast<size_t>(run.shapes.at("frame").d[0]);
    for (const auto& [name, tensor] : run.tensors) {
        if (tensor.input || name.rfind("layer", 0) != 0) continue;
        const std::string from = name.substr(0, name.rfind(".present")) + ".past";
        must((run.addresses.at(name) == run.addresses.at(from)) == !tensor.alias.empty(), name + " is bound to other memory");
        std::memmove(run.addresses.at(name), run.addresses.at(from), streams * tensor.row * sizeof(float));
    }
    const Tensor& key = run.tensors.at("layer0.key.past");
    for (size_t slot = 0; slot < streams; ++slot) {
        const size_t frame = run.tensors.at("frame").row;
        const int pixel = static_cast<uint8_t*>(run.addresses.at("frame"))[slot * frame];
        const int64_t position = static_cast<int64_t*>(run.addresses.at("position"))[slot];
        float* ring = static_cast<float*>(run.addresses.at("layer0.key.present")) + slot * key.row;
        ring[position % WINDOW] = pixel == 255 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(pixel);
        float sum = 0;
        for (int64_t at = 0; at < std::min<int64_t>(position + 1, WINDOW); ++at) sum += ring[at];
        fill(run, slot, sum);
    }
}

class Context : public nvinfer1::IExecutionContext {
public:
    explicit Context(const Tensors& tensors) {
        run_.tensors = tensors;
        impl_.run = &run_;
        impl_.runs = &runs_;
        mImpl = &impl_;
    }

private:
    struct Impl : stubs::VExecutionContext {
        bool setInputShape(char const* name, Dims const& dims) noexcept override {
            const auto found = run->tensors.find(name);
            if (found == run->tensors.end() || !found->second.input) return false;
            run->shapes[name] = dims;
            return true;
        }
        bool setTensorAddress(char const* name, void* data) noexcept override {
            const auto found = run->tensors.find(name);
            must(reinterpret_cast<uintptr_t>(data) % 256 == 0, std::string(name) + " is not aligned");
            run->addresses[name] = data;
            return found != run->tensors.end();
        }
        int32_t inferShapes(int32_t, char const**) noexcept override {
            return static_cast<int32_t>(std::count_if(run->tensors.begin(), run->tensors.end(), [&](const auto& item) {
                return item.second.input && run->shapes.count(item.first) == 0;
            }));
        }
        void setDeviceMemoryV2(void* memory, int64_t size) noexcept override {
            must(stand_in_on_device(memory, SCRATCH) && size >= static_cast<int64_t>(SCRATCH), "too little scratch");
            scratch = true;
        }
        bool enqueueV3(cudaStream_t) noexcept override {
            must(scratch && run->addresses.size() == run->tensors.size(), "a run before everything is bound");
            for (const auto& [name, address] : run->addresses) {
                const Tensor& tensor = run->tensors.at(name);
                must(stand_in_on_device(address, tensor.row * bytes_of(tensor.type)), name + " is not on the device");
            }
            runs->push_back(std::make_unique<Run>(*run));  // a captured graph keeps using it
            stand_in_put(carry_out, runs->back().get());
            return true;
        }

        Run* run = nullptr;
        std::vector<std::unique_ptr<Run>>* runs = nullptr;
        bool scratch = false;
    };

    Run run_;
    std::vector<std::unique_ptr<Run>> runs_;
    Impl impl_;
};

class Engine : public nvinfer1::ICudaEngine {
public:
    explicit Engine(Tensors tensors) {
        impl_.tensors = std::move(tensors);
        mImpl = &impl_;
    }

private:
    struct Impl : stubs::VCudaEngine {
        nvinfer1::IExecutionContext* createExecutionContext(
            nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override {
            must(strategy == nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED, "memory of its own");
            return new Context(tensors);
        }
        int64_t getDeviceMemorySizeV2() const noexcept override { return SCRATCH; }
        int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(tensors.size()); }
        char const* getIOTensorName(int32_t index) const noexcept override {
            return std::next(tensors.begin(), index)->first.c_str();
        }
        DataType getTensorDataType(char const* name) const noexcept override { return tensors.at(name).type; }
        char const* getAliasedInputTensor(char const* name) const noexcept override {
            const std::string& alias = tensors.at(name).alias;
            return alias.empty() ? nullptr : alias.c_str();
        }

        Tensors tensors;
    };

    Impl impl_;
};

class Runtime : public nvinfer1::IRuntime {
public:
    explicit Runtime(nvinfer1::ILogger* logger) {
        impl_.logger = logger;
        mImpl = &impl_;
    }

private:
    struct Impl : stubs::VRuntime {
        nvinfer1::ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
            std::istringstream lines(std::string(static_cast<const char*>(blob), size));
            Tensors tensors;
            std::string name, mode, alias;
            int type = 0;
            size_t row = 0;
            while (lines >> name >> type >> mode >> row >> alias) {
                tensors[name] = {static_cast<DataType>(type), mode == "in", row, alias == "-" ? "" : alias};
            }
            if (!tensors.empty()) return new Engine(std::move(tensors));
            logger->log(nvinfer1::ILogger::Severity::kERROR, "this is no\nengine");
            return nullptr;
        }
        void setEngineHostCodeAllowed(bool) noexcept override {}

        nvinfer1::ILogger* logger = nullptr;
    };

    Impl impl_;
};

}  // namespace

extern "C" {

void* createInferRuntime_INTERNAL(void* logger, int32_t) noexcept { return new Runtime(static_cast<nvinfer1::ILogger*>(logger)); }
int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
int32_t getInferLibMinorVersion() noexcept { return 99; }
int32_t getInferLibPatchVersion() noexcept { return 1; }
int32_t getInferLibBuildVersion() noexcept { return 2; }

}  // extern "C"
