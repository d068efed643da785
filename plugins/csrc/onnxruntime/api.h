// What of onnxruntime's C interface the custom operator uses, declared here: no package holds the
// headers. The table of functions only ever grows at its end, so places are the same in all
// versions from kMinor on. A test compares this file with onnxruntime's header where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vkvx::ort {

inline constexpr uint32_t kMinor = 23;  // the oldest 1.x that is supported, and the table asked for

struct Status;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct Value;
struct TensorInfo;  // type and shape
struct MemoryInfo;
struct Allocator;
struct SessionOptions;
struct Domain;

enum ErrorCode { kFail = 1 };
enum ElementType { kUndefined = 0, kFloat = 1, kInt32 = 6, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic { kRequired = 0, kOptional = 1 };
enum MemoryType { kDefaultMemory = 0 };

struct Api {
  void (*functions[1])();
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*version)();
};

// The function at a place of the table.
template <int kPlace, class Signature>
struct Entry;
template <int kPlace, class Result, class... Arguments>
struct Entry<kPlace, Result(Arguments...)> {
  Result operator()(const Api* api, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(api->functions[kPlace])(arguments...);
  }
};

// clang-format off
inline constexpr Entry<0, Status*(ErrorCode, const char*)> CreateStatus{};
inline constexpr Entry<2, const char*(const Status*)> GetErrorMessage{};
inline constexpr Entry<26, Status*(const char*, Domain**)> CreateCustomOpDomain{};
inline constexpr Entry<27, Status*(Domain*, const struct CustomOp*)> CustomOpDomain_Add{};
inline constexpr Entry<28, Status*(SessionOptions*, Domain*)> AddCustomOpDomain{};
inline constexpr Entry<51, Status*(Value*, void**)> GetTensorMutableData{};
inline constexpr Entry<60, Status*(const TensorInfo*, ElementType*)> GetTensorElementType{};
inline constexpr Entry<61, Status*(const TensorInfo*, size_t*)> GetDimensionsCount{};
inline constexpr Entry<62, Status*(const TensorInfo*, int64_t*, size_t)> GetDimensions{};
inline constexpr Entry<65, Status*(const Value*, TensorInfo**)> GetTensorTypeAndShape{};
inline constexpr Entry<76, Status*(Allocator*, void*)> AllocatorFree{};
inline constexpr Entry<85, Status*(const KernelInfo*, const char*, float*)> KernelInfoGetAttribute_float{};
inline constexpr Entry<86, Status*(const KernelInfo*, const char*, int64_t*)> KernelInfoGetAttribute_int64{};
inline constexpr Entry<87, Status*(const KernelInfo*, const char*, char*, size_t*)> KernelInfoGetAttribute_string{};
inline constexpr Entry<90, Status*(const KernelContext*, size_t, const Value**)> KernelContext_GetInput{};
inline constexpr Entry<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)> KernelContext_GetOutput{};
inline constexpr Entry<93, void(Status*)> ReleaseStatus{};
inline constexpr Entry<99, void(TensorInfo*)> ReleaseTensorTypeAndShapeInfo{};
inline constexpr Entry<132, void(Allocator*)> ReleaseAllocator{};
inline constexpr Entry<193, Status*(const KernelContext*, void**)> KernelContext_GetGPUComputeStream{};
inline constexpr Entry<194, Status*(const Value*, const MemoryInfo**)> GetTensorMemoryInfo{};
inline constexpr Entry<230, Status*(const KernelInfo*, size_t*)> KernelInfo_GetInputCount{};
inline constexpr Entry<231, Status*(const KernelInfo*, size_t*)> KernelInfo_GetOutputCount{};
inline constexpr Entry<253, Status*(const KernelContext*, const MemoryInfo*, Allocator**)> KernelContext_GetAllocator{};
inline constexpr Entry<268, Status*(const ShapeContext*, size_t, TensorInfo**)> ShapeInferContext_GetInputTypeShape{};
inline constexpr Entry<270, Status*(const ShapeContext*, size_t, const TensorInfo*)> ShapeInferContext_SetOutputTypeShape{};
inline constexpr Entry<277, Status*(const KernelContext*, const MemoryInfo*, size_t, void**)> KernelContext_GetScratchBuffer{};
// clang-format on

// An operator as onnxruntime asks for it; null where it need not.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

}  // namespace vkvx::ort
