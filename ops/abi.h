// The part of the ONNX Runtime C ABI that custom operators need, declared from its documented order.
//
// The runtime hands out an append-only table of function pointers, so a slot number means the same
// function in every release that has it. Nothing newer than API version 18 is used: one binary
// serves ONNX Runtime 1.18 and everything after it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define ONNXCOMP_ABI __stdcall
#define ONNXCOMP_EXPORT __declspec(dllexport)
#else
#define ONNXCOMP_ABI
#define ONNXCOMP_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtAllocator;
struct OrtMemoryInfo;
struct OrtApi;  // a table of function pointers, see Api below
struct OrtCustomOp;

struct OrtApiBase {
  const OrtApi*(ONNXCOMP_ABI* GetApi)(uint32_t version);
  const char*(ONNXCOMP_ABI* GetVersionString)();
};

// Function pointers in the order the runtime reads them; null where a feature is not used.
struct OrtCustomOp {
  uint32_t version;
  void*(ONNXCOMP_ABI* CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char*(ONNXCOMP_ABI* GetName)(const OrtCustomOp*);
  const char*(ONNXCOMP_ABI* GetExecutionProviderType)(const OrtCustomOp*);
  int(ONNXCOMP_ABI* GetInputType)(const OrtCustomOp*, size_t index);
  size_t(ONNXCOMP_ABI* GetInputTypeCount)(const OrtCustomOp*);
  int(ONNXCOMP_ABI* GetOutputType)(const OrtCustomOp*, size_t index);
  size_t(ONNXCOMP_ABI* GetOutputTypeCount)(const OrtCustomOp*);
  void(ONNXCOMP_ABI* KernelCompute)(void* kernel, OrtKernelContext*);
  void(ONNXCOMP_ABI* KernelDestroy)(void* kernel);
  int(ONNXCOMP_ABI* GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int(ONNXCOMP_ABI* GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int(ONNXCOMP_ABI* GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int(ONNXCOMP_ABI* GetVariadicInputMinArity)(const OrtCustomOp*);
  int(ONNXCOMP_ABI* GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int(ONNXCOMP_ABI* GetVariadicOutputMinArity)(const OrtCustomOp*);
  int(ONNXCOMP_ABI* GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus*(ONNXCOMP_ABI* CreateKernelV2)(const OrtCustomOp*, const OrtApi*,
                                           const OrtKernelInfo*, void** kernel);
  OrtStatus*(ONNXCOMP_ABI* KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus*(ONNXCOMP_ABI* InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int(ONNXCOMP_ABI* GetStartVersion)(const OrtCustomOp*);
  int(ONNXCOMP_ABI* GetEndVersion)(const OrtCustomOp*);
  size_t(ONNXCOMP_ABI* GetMayInplace)(int** input_index, int** output_index);
  void(ONNXCOMP_ABI* ReleaseMayInplace)(int* input_index, int* output_index);
  size_t(ONNXCOMP_ABI* GetAliasMap)(int** input_index, int** output_index);
  void(ONNXCOMP_ABI* ReleaseAliasMap)(int* input_index, int* output_index);
};

}  // extern "C"

namespace onnxcomp {

constexpr uint32_t kApiVersion = 18;

// Element types, in the numbering of TensorProto (the runtime differs from it only above 23).
enum ElementType : int {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
  kBfloat16 = 16,
};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// Where an input or an output lies: with the kernel's provider, or in the memory of the CPU.
enum MemoryPlace : int { kHostInput = -2, kProvider = 0 };

// How ReadOpAttr interprets the attribute it copies.
enum AttributeKind : int { kAttributeInt = 1, kAttributeInts = 2 };

// Typed access to the slots of the function table. Every method that returns OrtStatus* returns
// null for success; the caller owns a non-null status.
class Api {
 public:
  explicit Api(const OrtApi* table = nullptr) : table_(table) {}

  const OrtApi* table() const { return table_; }

  OrtStatus* CreateStatus(ErrorCode code, const char* message) const {
    return At<OrtStatus*(int, const char*)>(0)(code, message);
  }
  const char* GetErrorMessage(const OrtStatus* status) const {
    return At<const char*(const OrtStatus*)>(2)(status);
  }
  void ReleaseStatus(OrtStatus* status) const { At<void(OrtStatus*)>(93)(status); }

  OrtStatus* CreateCustomOpDomain(const char* name, OrtCustomOpDomain** out) const {
    return At<OrtStatus*(const char*, OrtCustomOpDomain**)>(26)(name, out);
  }
  OrtStatus* CustomOpDomainAdd(OrtCustomOpDomain* domain, const OrtCustomOp* op) const {
    return At<OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>(27)(domain, op);
  }
  OrtStatus* AddCustomOpDomain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return At<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }
  OrtStatus* AddSessionConfigEntry(OrtSessionOptions* options, const char* key,
                                   const char* value) const {
    using F = OrtStatus*(OrtSessionOptions*, const char*, const char*);
    return At<F>(130)(options, key, value);
  }
  OrtStatus* HasSessionConfigEntry(const OrtSessionOptions* options, const char* key,
                                   int* out) const {
    return At<OrtStatus*(const OrtSessionOptions*, const char*, int*)>(237)(options, key, out);
  }

  OrtStatus* GetTensorMutableData(OrtValue* value, void** out) const {
    return At<OrtStatus*(OrtValue*, void**)>(51)(value, out);
  }
  OrtStatus* GetTensorTypeAndShape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) const {
    return At<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, out);
  }
  OrtStatus* CreateTensorTypeAndShapeInfo(OrtTensorTypeAndShapeInfo** out) const {
    return At<OrtStatus*(OrtTensorTypeAndShapeInfo**)>(57)(out);
  }
  OrtStatus* SetTensorElementType(OrtTensorTypeAndShapeInfo* info, int type) const {
    return At<OrtStatus*(OrtTensorTypeAndShapeInfo*, int)>(58)(info, type);
  }
  OrtStatus* SetDimensions(OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t n) const {
    return At<OrtStatus*(OrtTensorTypeAndShapeInfo*, const int64_t*, size_t)>(59)(info, dims, n);
  }
  OrtStatus* GetTensorElementType(const OrtTensorTypeAndShapeInfo* info, int* out) const {
    return At<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int*)>(60)(info, out);
  }
  OrtStatus* GetDimensionsCount(const OrtTensorTypeAndShapeInfo* info, size_t* out) const {
    return At<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, out);
  }
  OrtStatus* GetDimensions(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t n) const {
    return At<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(info, dims, n);
  }
  OrtStatus* GetSymbolicDimensions(const OrtTensorTypeAndShapeInfo* info, const char** names,
                                   size_t n) const {
    using F = OrtStatus*(const OrtTensorTypeAndShapeInfo*, const char**, size_t);
    return At<F>(63)(info, names, n);
  }
  OrtStatus* SetSymbolicDimensions(OrtTensorTypeAndShapeInfo* info, const char** names,
                                   size_t n) const {
    return At<OrtStatus*(OrtTensorTypeAndShapeInfo*, const char**, size_t)>(271)(info, names, n);
  }
  void ReleaseTensorTypeAndShapeInfo(OrtTensorTypeAndShapeInfo* info) const {
    At<void(OrtTensorTypeAndShapeInfo*)>(99)(info);
  }

  OrtStatus* KernelInfoGetInt(const OrtKernelInfo* info, const char* name, int64_t* out) const {
    return At<OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  OrtStatus* KernelInfoGetInts(const OrtKernelInfo* info, const char* name, int64_t* out,
                               size_t* size) const {
    using F = OrtStatus*(const OrtKernelInfo*, const char*, int64_t*, size_t*);
    return At<F>(163)(info, name, out, size);
  }
  OrtStatus* KernelInfoGetNodeName(const OrtKernelInfo* info, char* out, size_t* size) const {
    return At<OrtStatus*(const OrtKernelInfo*, char*, size_t*)>(244)(info, out, size);
  }
  OrtStatus* KernelInfoGetConstantInput(const OrtKernelInfo* info, size_t index, int* constant,
                                        const OrtValue** out) const {
    using F = OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**);
    return At<F>(249)(info, index, constant, out);
  }

  OrtStatus* GetInput(const OrtKernelContext* context, size_t index, const OrtValue** out) const {
    return At<OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index,
                                                                                 out);
  }
  OrtStatus* GetOutput(OrtKernelContext* context, size_t index, const int64_t* dims, size_t n,
                       OrtValue** out) const {
    using F = OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**);
    return At<F>(91)(context, index, dims, n, out);
  }
  OrtStatus* KernelContextGetGpuStream(const OrtKernelContext* context, void** out) const {
    return At<OrtStatus*(const OrtKernelContext*, void**)>(193)(context, out);
  }
  // Memory that other streams do not get before this one is done with it. Ends with `AllocatorFree`.
  OrtStatus* KernelContextGetScratch(const OrtKernelContext* context, const OrtMemoryInfo* memory,
                                     size_t bytes, void** out) const {
    using F = OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, size_t, void**);
    return At<F>(277)(context, memory, bytes, out);
  }
  OrtStatus* KernelInfoGetAllocator(const OrtKernelInfo* info, int place,
                                    OrtAllocator** out) const {
    return At<OrtStatus*(const OrtKernelInfo*, int, OrtAllocator**)>(278)(info, place, out);
  }
  void ReleaseAllocator(OrtAllocator* allocator) const {
    At<void(OrtAllocator*)>(132)(allocator);
  }
  OrtStatus* AllocatorAlloc(OrtAllocator* allocator, size_t bytes, void** out) const {
    return At<OrtStatus*(OrtAllocator*, size_t, void**)>(75)(allocator, bytes, out);
  }
  OrtStatus* AllocatorFree(OrtAllocator* allocator, void* memory) const {
    return At<OrtStatus*(OrtAllocator*, void*)>(76)(allocator, memory);
  }
  OrtStatus* AllocatorGetInfo(const OrtAllocator* allocator, const OrtMemoryInfo** out) const {
    return At<OrtStatus*(const OrtAllocator*, const OrtMemoryInfo**)>(77)(allocator, out);
  }

  OrtStatus* ParallelFor(const OrtKernelContext* context, void(ONNXCOMP_ABI* fn)(void*, size_t),
                         size_t total, size_t batches, void* user) const {
    using F = OrtStatus*(const OrtKernelContext*, void(ONNXCOMP_ABI*)(void*, size_t), size_t,
                         size_t, void*);
    return At<F>(274)(context, fn, total, batches, user);
  }

  OrtStatus* InferGetInput(const OrtShapeInferContext* context, size_t index,
                           OrtTensorTypeAndShapeInfo** out) const {
    using F = OrtStatus*(const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**);
    return At<F>(268)(context, index, out);
  }
  OrtStatus* InferGetAttribute(const OrtShapeInferContext* context, const char* name,
                               const OrtOpAttr** out) const {
    using F = OrtStatus*(const OrtShapeInferContext*, const char*, const OrtOpAttr**);
    return At<F>(269)(context, name, out);
  }
  OrtStatus* InferSetOutput(const OrtShapeInferContext* context, size_t index,
                            const OrtTensorTypeAndShapeInfo* info) const {
    using F = OrtStatus*(const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*);
    return At<F>(270)(context, index, info);
  }
  OrtStatus* ReadOpAttr(const OrtOpAttr* attribute, AttributeKind kind, void* out, size_t bytes,
                        size_t* needed) const {
    using F = OrtStatus*(const OrtOpAttr*, int, void*, size_t, size_t*);
    return At<F>(272)(attribute, kind, out, bytes, needed);
  }

 protected:
  template <class Signature>
  struct Pointer;
  template <class R, class... Args>
  struct Pointer<R(Args...)> {
    using Type = R(ONNXCOMP_ABI*)(Args...);
  };

  template <class Signature>
  typename Pointer<Signature>::Type At(size_t slot) const {
    using Generic = void(ONNXCOMP_ABI*)();
    const Generic* slots = reinterpret_cast<const Generic*>(table_);
    return reinterpret_cast<typename Pointer<Signature>::Type>(slots[slot]);
  }

 private:
  const OrtApi* table_;
};

}  // namespace onnxcomp
