// The CUDA driver, loaded at run time: memory, one stream, captured graphs. Everything happens on the first device in its
// primary context; whatever calls the driver or TensorRT does so within a `Cuda::Current`.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "error.h"

namespace framestep {

// cuda.h defines some of these names as those of their newest versions, under which they are looked up.
#define FRAMESTEP_CUDA_CALLS(X)                                                                                          \
    X(cuInit) X(cuDeviceGet) X(cuDeviceGetAttribute) X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxRelease)            \
    X(cuCtxPushCurrent) X(cuCtxPopCurrent) X(cuMemGetInfo) X(cuMemAlloc) X(cuMemFree) X(cuMemAllocHost) X(cuMemFreeHost) \
    X(cuMemcpyHtoDAsync) X(cuMemcpyDtoHAsync) X(cuMemcpyDtoDAsync) X(cuMemsetD8Async) X(cuStreamCreate)                  \
    X(cuStreamDestroy) X(cuStreamSynchronize) X(cuStreamBeginCapture) X(cuStreamEndCapture) X(cuGraphInstantiate)        \
    X(cuGraphDestroy) X(cuGraphLaunch) X(cuGraphExecDestroy) X(cuGetErrorName)

struct CudaCalls {
#define X(name) decltype(&::name) name = nullptr;
    FRAMESTEP_CUDA_CALLS(X)
#undef X
};

// The GPU failed in what it was doing, or is gone: nothing that was on it can be used any more.
struct DeviceLost : Error {
    using Error::Error;
};

// The first device and a stream on it. Throws Error(FS_ERROR_ENGINE): there is no driver or no GPU.
class Cuda {
public:
    Cuda();
    ~Cuda();
    Cuda(const Cuda&) = delete;
    Cuda& operator=(const Cuda&) = delete;

    // Makes the device's context this thread's, for its own life.
    class Current {
    public:
        explicit Current(const Cuda& cuda);
        ~Current();
        Current(const Current&) = delete;
        Current& operator=(const Current&) = delete;

    private:
        const Cuda& cuda_;
    };

    CUstream stream() const { return stream_; }
    std::string compute_capability() const;  // "8.7"
    size_t free_bytes() const;

    // In the order of the stream; in a capture from and to pinned memory only.
    void upload(CUdeviceptr to, const void* from, size_t bytes) const;
    void download(void* to, CUdeviceptr from, size_t bytes) const;
    void copy(CUdeviceptr to, CUdeviceptr from, size_t bytes) const;
    void zero(CUdeviceptr place, size_t bytes) const;
    void wait() const;

    // For destructors: `work` with the context current, if the device is still there. A lost one has freed everything itself.
    template <class Work>
    void give_back(Work work) const noexcept {
        if (calls.cuCtxPushCurrent(context_) != CUDA_SUCCESS) return;
        work();
        CUcontext popped = nullptr;
        calls.cuCtxPopCurrent(&popped);
    }

    // Throws DeviceLost.
    void check(CUresult result) const;
    std::string name_of(CUresult result) const;

    const CudaCalls& calls;

private:
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
    CUstream stream_ = nullptr;
};

// Zeroed memory of the device. Throws Error(FS_ERROR_MEMORY), which says what for.
class DeviceMemory {
public:
    DeviceMemory() = default;
    DeviceMemory(const Cuda& cuda, size_t bytes, const std::string& what);
    DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
    DeviceMemory& operator=(DeviceMemory&& other) noexcept;
    ~DeviceMemory();

    CUdeviceptr address() const { return address_; }

private:
    const Cuda* cuda_ = nullptr;
    CUdeviceptr address_ = 0;
};

// Zeroed memory of the host that the device copies from and to.
class PinnedMemory {
public:
    PinnedMemory() = default;
    PinnedMemory(const Cuda& cuda, size_t bytes);
    PinnedMemory(PinnedMemory&& other) noexcept { *this = std::move(other); }
    PinnedMemory& operator=(PinnedMemory&& other) noexcept;
    ~PinnedMemory();

    uint8_t* data() const { return static_cast<uint8_t*>(data_); }

private:
    const Cuda* cuda_ = nullptr;
    void* data_ = nullptr;
};

// What was put on the stream while it captured, to be launched at once. Other threads may use the GPU meanwhile.
class CudaGraph {
public:
    CudaGraph() = default;
    // Where another thread waits for the whole device, as libraries do, that breaks a capture, and `work` is captured again;
    // nothing of it has run.
    template <class Work>
    CudaGraph(const Cuda& cuda, Work work) : cuda_(&cuda) {
        for (int left = CAPTURES; left > 0; --left) {
            try {
                capture(work);
                return;
            } catch (const Error&) {
                if (left == 1) throw;
            }
        }
    }
    CudaGraph(CudaGraph&& other) noexcept { *this = std::move(other); }
    CudaGraph& operator=(CudaGraph&& other) noexcept;
    ~CudaGraph();

    void launch() const { cuda_->check(cuda_->calls.cuGraphLaunch(captured_, cuda_->stream())); }

private:
    static constexpr int CAPTURES = 3;  // attempts

    template <class Work>
    void capture(Work& work) {
        const Cuda& cuda = *cuda_;
        cuda.check(cuda.calls.cuStreamBeginCapture(cuda.stream(), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
        CUgraph graph = nullptr;
        try {
            work();
        } catch (...) {
            cuda.calls.cuStreamEndCapture(cuda.stream(), &graph);  // the stream is of no use while it captures
            if (graph != nullptr) cuda.calls.cuGraphDestroy(graph);
            throw;
        }
        cuda.check(cuda.calls.cuStreamEndCapture(cuda.stream(), &graph));
        const CUresult result = cuda.calls.cuGraphInstantiate(&captured_, graph, 0);
        cuda.calls.cuGraphDestroy(graph);
        cuda.check(result);
    }

    const Cuda* cuda_ = nullptr;
    CUgraphExec captured_ = nullptr;
};

}  // namespace framestep
