// A CUDA driver without a GPU, for the rehearsal: device memory is host memory, what is put on a stream is done at once or,
// while it captures, when the graph is launched. What must not be asked of it ends the program.
#include <cuda.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "stand_in.h"

namespace {

using Work = std::function<void()>;

std::map<std::string, long> counts;
std::map<void*, size_t> device, pinned;
thread_local int current = 0;  // how often the context is
bool capturing = false, lost = false;
std::vector<Work> captured;
size_t free_bytes = size_t{1} << 34;

void must(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "the stand-in for the driver: %s\n", what);
    std::abort();
}

CUresult enter(const char* name) {
    must(current > 0, name);
    ++counts[name];
    return lost ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

bool within(const std::map<void*, size_t>& memory, const void* place, size_t bytes) {
    for (const auto& [start, size] : memory) {
        const auto* begin = static_cast<const char*>(start);
        const auto* at = static_cast<const char*>(place);
        if (begin <= at && at + bytes <= begin + size) return true;
    }
    return false;
}

CUresult put(const char* name, Work work) {
    const CUresult result = enter(name);
    if (result != CUDA_SUCCESS) return result;
    if (capturing) {
        captured.push_back(std::move(work));
    } else {
        work();
    }
    return CUDA_SUCCESS;
}

CUresult copy(const char* name, void* to, const void* from, size_t bytes, const void* host) {
    must(within(device, host == to ? from : to, bytes), "a copy beside the device's memory");
    if (capturing && host != nullptr) must(within(pinned, host, bytes), "a captured copy of memory that is not pinned");
    return put(name, [=] { std::memcpy(to, from, bytes); });
}

CUresult allocate(std::map<void*, size_t>& kind, void** place, size_t bytes) {
    if (bytes > free_bytes) return CUDA_ERROR_OUT_OF_MEMORY;
    const size_t rounded = (bytes + 255) / 256 * 256;
    *place = std::aligned_alloc(256, rounded);
    std::memset(*place, 0xCD, rounded);  // nobody clears it
    kind[*place] = bytes;
    free_bytes -= bytes;
    return CUDA_SUCCESS;
}

CUresult give_back(std::map<void*, size_t>& kind, void* place) {
    const auto found = kind.find(place);
    must(found != kind.end(), "memory is freed that was not allocated");
    free_bytes += found->second;
    kind.erase(found);
    std::free(place);
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

long stand_in_count(const char* name) { return counts[name]; }
size_t stand_in_held() { return device.size() + pinned.size() + static_cast<size_t>(counts["graphs"] + counts["contexts"]); }
void stand_in_lose(int now) { lost = now != 0; }
size_t stand_in_free(size_t bytes) { return std::exchange(free_bytes, bytes); }
void stand_in_put(StandInWork work, void* argument) {
    must(put("enqueue", [=] { work(argument); }) == CUDA_SUCCESS, "TensorRT runs on a lost device");
}
int stand_in_on_device(const void* place, size_t bytes) { return within(device, place, bytes) ? 1 : 0; }

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* found, int) { return *found = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
    *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 8 : 7;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    ++counts["contexts"];
    return *context = reinterpret_cast<CUcontext>(&counts), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) { return --counts["contexts"], CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext) { return ++current, CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext* popped) {
    must(popped != nullptr && current-- > 0, "a context is popped that was not pushed");
    return CUDA_SUCCESS;
}
CUresult cuMemGetInfo(size_t* free, size_t* total) { return *free = free_bytes, *total = free_bytes, enter("cuMemGetInfo"); }
CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
    void* place = nullptr;
    const CUresult result = enter("cuMemAlloc");
    if (result != CUDA_SUCCESS) return result;
    const CUresult allocated = allocate(device, &place, bytes);
    return *address = reinterpret_cast<CUdeviceptr>(place), allocated;
}
CUresult cuMemFree(CUdeviceptr address) { return enter("cuMemFree"), give_back(device, reinterpret_cast<void*>(address)); }
CUresult cuMemAllocHost(void** place, size_t bytes) { return enter("cuMemAllocHost"), allocate(pinned, place, bytes); }
CUresult cuMemFreeHost(void* place) { return enter("cuMemFreeHost"), give_back(pinned, place); }
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream) {
    return copy("upload", reinterpret_cast<void*>(to), from, bytes, from);
}
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream) {
    return copy("download", to, reinterpret_cast<void*>(from), bytes, to);
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
    return copy("copy", reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes, nullptr);
}
CUresult cuMemsetD8Async(CUdeviceptr place, unsigned char value, size_t bytes, CUstream) {
    must(within(device, reinterpret_cast<void*>(place), bytes), "a memset beside the device's memory");
    return put("memset", [=] { std::memset(reinterpret_cast<void*>(place), value, bytes); });
}
CUresult cuStreamCreate(CUstream* stream, unsigned) { return *stream = reinterpret_cast<CUstream>(&counts), enter("stream"); }
CUresult cuStreamDestroy(CUstream) { return enter("cuStreamDestroy"); }
CUresult cuStreamSynchronize(CUstream) {
    must(!capturing, "a synchronisation inside a capture");
    return enter("wait");
}
CUresult cuStreamBeginCapture(CUstream, CUstreamCaptureMode mode) {
    must(!capturing && mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, "a capture that is not of this thread alone");
    capturing = true;
    return enter("cuStreamBeginCapture");
}
CUresult cuStreamEndCapture(CUstream, CUgraph* graph) {
    capturing = false;
    *graph = reinterpret_cast<CUgraph>(new std::vector<Work>(std::exchange(captured, {})));
    return enter("cuStreamEndCapture");
}
CUresult cuGraphInstantiate(CUgraphExec* made, CUgraph graph, unsigned long long) {
    ++counts["graphs"];
    *made = reinterpret_cast<CUgraphExec>(new std::vector<Work>(*reinterpret_cast<std::vector<Work>*>(graph)));
    return enter("cuGraphInstantiate");
}
CUresult cuGraphDestroy(CUgraph graph) {
    delete reinterpret_cast<std::vector<Work>*>(graph);
    return enter("cuGraphDestroy");
}
CUresult cuGraphLaunch(CUgraphExec graph, CUstream) {
    const CUresult result = enter("launch");
    if (result != CUDA_SUCCESS) return result;
    for (const Work& work : *reinterpret_cast<std::vector<Work>*>(graph)) work();
    return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec graph) {
    --counts["graphs"];
    delete reinterpret_cast<std::vector<Work>*>(graph);
    return enter("cuGraphExecDestroy");
}
CUresult cuGetErrorName(CUresult result, const char** name) {
    *name = result == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "another error";
    return CUDA_SUCCESS;
}

}  // extern "C"
