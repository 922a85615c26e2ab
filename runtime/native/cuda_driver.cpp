#include "cuda_driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace framestep {
namespace {

constexpr const char* LIBRARY = "libcuda.so.1";

#define TEXT_OF(name) #name
#define SYMBOL(name) TEXT_OF(name)

CudaCalls load() {
    void* library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);  // never closed: its threads live as long as the process
    if (library == nullptr) {
        throw Error(FS_ERROR_ENGINE, std::string("there is no NVIDIA driver here (") + LIBRARY + " cannot be loaded)");
    }
    CudaCalls calls;
#define X(name)                                                                                                     \
    calls.name = reinterpret_cast<decltype(calls.name)>(dlsym(library, SYMBOL(name)));                              \
    if (calls.name == nullptr) {                                                                                    \
        throw Error(FS_ERROR_ENGINE, std::string("the NVIDIA driver is too old: it has no ") + SYMBOL(name));       \
    }
    FRAMESTEP_CUDA_CALLS(X)
#undef X
    return calls;
}

const CudaCalls& loaded_calls() {
    static const CudaCalls calls = load();
    return calls;
}

}  // namespace

Cuda::Cuda() : calls(loaded_calls()) {
    CUresult result = calls.cuInit(0);
    if (result == CUDA_SUCCESS) result = calls.cuDeviceGet(&device_, 0);
    if (result == CUDA_SUCCESS) result = calls.cuDevicePrimaryCtxRetain(&context_, device_);
    if (result != CUDA_SUCCESS) {
        throw Error(FS_ERROR_ENGINE, "there is no NVIDIA GPU here that the driver can use (" + name_of(result) + ")");
    }
    try {
        const Current current(*this);
        check(calls.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING));
    } catch (...) {
        calls.cuDevicePrimaryCtxRelease(device_);
        throw;
    }
}

Cuda::~Cuda() {
    give_back([this] { calls.cuStreamDestroy(stream_); });
    calls.cuDevicePrimaryCtxRelease(device_);
}

Cuda::Current::Current(const Cuda& cuda) : cuda_(cuda) { cuda.check(cuda.calls.cuCtxPushCurrent(cuda.context_)); }
Cuda::Current::~Current() {
    CUcontext popped = nullptr;
    cuda_.calls.cuCtxPopCurrent(&popped);
}

std::string Cuda::compute_capability() const {
    int major = 0, minor = 0;
    check(calls.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device_));
    check(calls.cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device_));
    return std::to_string(major) + "." + std::to_string(minor);
}

size_t Cuda::free_bytes() const {
    size_t free = 0, total = 0;
    check(calls.cuMemGetInfo(&free, &total));
    return free;
}

void Cuda::upload(CUdeviceptr to, const void* from, size_t bytes) const {
    if (bytes > 0) check(calls.cuMemcpyHtoDAsync(to, from, bytes, stream_));
}

void Cuda::download(void* to, CUdeviceptr from, size_t bytes) const {
    if (bytes > 0) check(calls.cuMemcpyDtoHAsync(to, from, bytes, stream_));
}

void Cuda::copy(CUdeviceptr to, CUdeviceptr from, size_t bytes) const {
    if (bytes > 0) check(calls.cuMemcpyDtoDAsync(to, from, bytes, stream_));
}

void Cuda::zero(CUdeviceptr place, size_t bytes) const {
    if (bytes > 0) check(calls.cuMemsetD8Async(place, 0, bytes, stream_));
}

void Cuda::wait() const { check(calls.cuStreamSynchronize(stream_)); }

void Cuda::check(CUresult result) const {
    if (result == CUDA_SUCCESS) return;
    throw DeviceLost(FS_ERROR_ENGINE, "the GPU failed or was lost (" + name_of(result) + "); close the session and open it"
                                      " again");
}

std::string Cuda::name_of(CUresult result) const {
    const char* name = nullptr;
    calls.cuGetErrorName(result, &name);
    return name == nullptr ? "error " + std::to_string(static_cast<int>(result)) : name;
}

DeviceMemory::DeviceMemory(const Cuda& cuda, size_t bytes, const std::string& what) : cuda_(&cuda) {
    const Cuda::Current current(cuda);
    bytes = std::max<size_t>(bytes, 1);
    const CUresult result = cuda.calls.cuMemAlloc(&address_, bytes);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
        throw Error(FS_ERROR_MEMORY, "no memory on the GPU for " + what + ": " + std::to_string(bytes) + " bytes are needed and " +
                                         std::to_string(cuda.free_bytes()) + " are free; open the session with fewer streams,"
                                         " or end what else uses the GPU");
    }
    cuda.check(result);
    try {
        cuda.zero(address_, bytes);
        cuda.wait();
    } catch (...) {
        cuda.calls.cuMemFree(address_);
        throw;
    }
}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
    std::swap(cuda_, other.cuda_);
    std::swap(address_, other.address_);
    return *this;
}

DeviceMemory::~DeviceMemory() {
    if (address_ != 0) cuda_->give_back([this] { cuda_->calls.cuMemFree(address_); });
}

PinnedMemory::PinnedMemory(const Cuda& cuda, size_t bytes) : cuda_(&cuda) {
    const Cuda::Current current(cuda);
    bytes = std::max<size_t>(bytes, 1);
    const CUresult result = cuda.calls.cuMemAllocHost(&data_, bytes);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
        throw Error(FS_ERROR_MEMORY, "no pinned memory on the host for a buffer of " + std::to_string(bytes) + " bytes");
    }
    cuda.check(result);
    std::memset(data_, 0, bytes);
}

PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
    std::swap(cuda_, other.cuda_);
    std::swap(data_, other.data_);
    return *this;
}

PinnedMemory::~PinnedMemory() {
    if (data_ != nullptr) cuda_->give_back([this] { cuda_->calls.cuMemFreeHost(data_); });
}

CudaGraph& CudaGraph::operator=(CudaGraph&& other) noexcept {
    std::swap(cuda_, other.cuda_);
    std::swap(captured_, other.captured_);
    return *this;
}

CudaGraph::~CudaGraph() {
    if (captured_ != nullptr) cuda_->give_back([this] { cuda_->calls.cuGraphExecDestroy(captured_); });
}

}  // namespace framestep
