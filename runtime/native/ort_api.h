// The part of ONNX Runtime's C interface that the engine uses, so that nothing of it is needed at build time.
//
// OrtGetApiBase()->GetApi(n) gives a table of functions to which versions only ever append
// (https://onnxruntime.ai/docs/api/c/struct_ort_api.html). `Ort` copies the entries in use out of it by their numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace framestep {

struct OrtEnv;
struct OrtStatus;
struct OrtMemoryInfo;
struct OrtIoBinding;
struct OrtNativeSession;
struct OrtValue;
struct OrtRunOptions;
struct OrtTypeInfo;
struct OrtTensorInfo;
struct OrtSessionOptions;
struct OrtCudaOptions;
struct OrtAllocator;
struct OrtCustomOp;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;

struct OrtApiBase {
    const void* const* (*GetApi)(uint32_t version);  // prints and gives null for a version that is too new
    const char* (*GetVersionString)();
};

using OrtLogger = void (*)(void* user, int severity, const char* category, const char* id, const char* place,
                           const char* message);

enum OrtElement : int {
    ORT_FLOAT = 1,
    ORT_UINT8 = 2,
    ORT_INT8 = 3,
    ORT_INT32 = 6,
    ORT_INT64 = 7,
    ORT_BOOL = 9,
    ORT_FLOAT16 = 10,
};

constexpr int ORT_WARNING = 2;           // severities: verbose, info, warning, error, fatal
constexpr int ORT_SEQUENTIAL = 0;        // execution mode
constexpr int ORT_ENABLE_ALL = 99;       // graph optimisation
constexpr int ORT_DEVICE_ALLOCATOR = 0;  // allocator type
constexpr int ORT_MEMORY_DEFAULT = 0;    // memory type

// X(number in the table, name, arguments): functions that return a status, null for success
#define FRAMESTEP_ORT_CALLS(X)                                                                                       \
    X(0, CreateStatus, int code, const char* message)                                                                \
    X(4, CreateEnvWithCustomLogger, OrtLogger, void* user, int severity, const char* id, OrtEnv**)                   \
    X(7, CreateSession, const OrtEnv*, const char* path, const OrtSessionOptions*, OrtNativeSession**)               \
    X(8, CreateSessionFromArray, const OrtEnv*, const void*, size_t, const OrtSessionOptions*, OrtNativeSession**)   \
    X(10, CreateSessionOptions, OrtSessionOptions**)                                                                 \
    X(13, SetSessionExecutionMode, OrtSessionOptions*, int mode)                                                     \
    X(22, SetSessionLogSeverityLevel, OrtSessionOptions*, int severity)                                              \
    X(23, SetSessionGraphOptimizationLevel, OrtSessionOptions*, int level)                                           \
    X(24, SetIntraOpNumThreads, OrtSessionOptions*, int threads)                                                     \
    X(25, SetInterOpNumThreads, OrtSessionOptions*, int threads)                                                     \
    X(26, CreateCustomOpDomain, const char* domain, OrtCustomOpDomain**)                                             \
    X(27, CustomOpDomain_Add, OrtCustomOpDomain*, const OrtCustomOp*)                                                \
    X(28, AddCustomOpDomain, OrtSessionOptions*, OrtCustomOpDomain*)                                                 \
    X(30, SessionGetInputCount, const OrtNativeSession*, size_t*)                                                    \
    X(31, SessionGetOutputCount, const OrtNativeSession*, size_t*)                                                   \
    X(33, SessionGetInputTypeInfo, const OrtNativeSession*, size_t index, OrtTypeInfo**)                             \
    X(34, SessionGetOutputTypeInfo, const OrtNativeSession*, size_t index, OrtTypeInfo**)                            \
    X(36, SessionGetInputName, const OrtNativeSession*, size_t index, OrtAllocator*, char**)                         \
    X(37, SessionGetOutputName, const OrtNativeSession*, size_t index, OrtAllocator*, char**)                        \
    X(49, CreateTensorWithDataAsOrtValue, const OrtMemoryInfo*, void*, size_t bytes, const int64_t*, size_t rank,    \
      int element, OrtValue**)                                                                                       \
    X(51, GetTensorMutableData, OrtValue*, void**)                                                                   \
    X(55, CastTypeInfoToTensorInfo, const OrtTypeInfo*, const OrtTensorInfo**)                                       \
    X(60, GetTensorElementType, const OrtTensorInfo*, int*)                                                          \
    X(61, GetDimensionsCount, const OrtTensorInfo*, size_t*)                                                         \
    X(62, GetDimensions, const OrtTensorInfo*, int64_t*, size_t)                                                     \
    X(63, GetSymbolicDimensions, const OrtTensorInfo*, const char**, size_t)                                         \
    X(65, GetTensorTypeAndShape, const OrtValue*, OrtTensorInfo**)                                                   \
    X(68, CreateMemoryInfo, const char* name, int allocator, int device, int memory, OrtMemoryInfo**)                \
    X(75, AllocatorAlloc, OrtAllocator*, size_t, void**)                                                             \
    X(76, AllocatorFree, OrtAllocator*, void*)                                                                       \
    X(78, GetAllocatorWithDefaultOptions, OrtAllocator**)                                                            \
    X(85, KernelInfoGetAttribute_float, const OrtKernelInfo*, const char* name, float*)                              \
    X(86, KernelInfoGetAttribute_int64, const OrtKernelInfo*, const char* name, int64_t*)                            \
    X(90, KernelContext_GetInput, const OrtKernelContext*, size_t index, const OrtValue**)                           \
    X(91, KernelContext_GetOutput, OrtKernelContext*, size_t index, const int64_t*, size_t rank, OrtValue**)         \
    X(125, GetAvailableProviders, char***, int*)                                                                     \
    X(126, ReleaseAvailableProviders, char**, int)                                                                   \
    X(130, AddSessionConfigEntry, OrtSessionOptions*, const char* key, const char* value)                            \
    X(131, CreateAllocator, const OrtNativeSession*, const OrtMemoryInfo*, OrtAllocator**)                           \
    X(133, RunWithBinding, OrtNativeSession*, const OrtRunOptions*, const OrtIoBinding*)                             \
    X(134, CreateIoBinding, OrtNativeSession*, OrtIoBinding**)                                                       \
    X(136, BindInput, OrtIoBinding*, const char* name, const OrtValue*)                                              \
    X(137, BindOutput, OrtIoBinding*, const char* name, const OrtValue*)                                             \
    X(204, SessionOptionsAppendExecutionProvider_CUDA_V2, OrtSessionOptions*, const OrtCudaOptions*)                 \
    X(205, CreateCUDAProviderOptions, OrtCudaOptions**)                                                              \
    X(206, UpdateCUDAProviderOptions, OrtCudaOptions*, const char* const* keys, const char* const* values, size_t)   \
    X(274, KernelContext_ParallelFor, const OrtKernelContext*, void (*call)(void* user, size_t index), size_t total,  \
      size_t batches, void* user)

// X(number, name, argument): functions that release
#define FRAMESTEP_ORT_RELEASES(X)              \
    X(92, ReleaseEnv, OrtEnv)                  \
    X(93, ReleaseStatus, OrtStatus)            \
    X(94, ReleaseMemoryInfo, OrtMemoryInfo)    \
    X(95, ReleaseSession, OrtNativeSession)    \
    X(96, ReleaseValue, OrtValue)              \
    X(98, ReleaseTypeInfo, OrtTypeInfo)        \
    X(99, ReleaseTensorTypeAndShapeInfo, OrtTensorInfo) \
    X(100, ReleaseSessionOptions, OrtSessionOptions) \
    X(101, ReleaseCustomOpDomain, OrtCustomOpDomain) \
    X(132, ReleaseAllocator, OrtAllocator)     \
    X(135, ReleaseIoBinding, OrtIoBinding)     \
    X(208, ReleaseCUDAProviderOptions, OrtCudaOptions)

constexpr uint32_t ORT_API_VERSION_USED = 17;  // the first that has all of them

// An operator of ours, as ONNX Runtime calls it: its members up to those of version 17. The calls that may be null are
// null, where another version of them is there or their default will do.
struct OrtCustomOp {
    uint32_t version;
    void* (*CreateKernel)(const OrtCustomOp*, const void* api, const OrtKernelInfo*);
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    int (*GetInputType)(const OrtCustomOp*, size_t index);  // an OrtElement
    size_t (*GetInputTypeCount)(const OrtCustomOp*);
    int (*GetOutputType)(const OrtCustomOp*, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void (*KernelCompute)(void* kernel, OrtKernelContext*);
    void (*KernelDestroy)(void* kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
    int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
    int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const void* api, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, void* context);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
};

struct Ort {
#define X(number, name, ...) OrtStatus* (*name)(__VA_ARGS__) = nullptr;
    FRAMESTEP_ORT_CALLS(X)
#undef X
#define X(number, name, type) void (*name)(type*) = nullptr;
    FRAMESTEP_ORT_RELEASES(X)
#undef X
    const char* (*GetErrorMessage)(const OrtStatus*) = nullptr;

    OrtEnv* env = nullptr;
    std::string path;     // of the library
    std::string version;  // "1.31.1"

    // Throws an Error with ONNX Runtime's message, on one line, behind `what`.
    void check(OrtStatus* status, std::string_view what) const;
};

// ONNX Runtime's library, loaded once and never unloaded.
// Throws Error(FS_ERROR_ENGINE): there is none at `path` (empty: in the places where one may be), or one that does not do.
const Ort& load_ort(const std::string& path);

}  // namespace framestep
