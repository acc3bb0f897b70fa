// RegisterCustomOps, by which most programs load the library, and the table of operators behind it.

#include "common/custom_op.h"

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <utility>

#include "common/keep_loaded.h"
#include "hash/kernel.h"
#include "hyper/kernel.h"
#include "sparse/kernel.h"
#include "winding/kernel.h"

namespace onnxcomp {
namespace {

// A kernel together with what its error messages need.
struct Instance {
  Api api;
  std::string where;
  std::unique_ptr<Kernel> kernel;
};

const CustomOp& Self(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

OrtStatus* ONNXCOMP_ABI CreateInstance(const OrtCustomOp* raw, const OrtApi* table,
                                       const OrtKernelInfo* info, void** out) {
  const CustomOp& op = Self(raw);
  const Api api(table);
  *out = nullptr;
  std::string where = "onnxcomp";
  return Guard(api, where, [&] {
    const NodeInfo node(api, info);
    where = std::string(op.name) + " '" + node.name() + "'";  // Guard reads it when it fails
    *out = new Instance{api, where, op.create(node, op)};
  });
}

OrtStatus* ONNXCOMP_ABI ComputeInstance(void* raw, OrtKernelContext* context) {
  const Instance& instance = *static_cast<const Instance*>(raw);
  return Guard(instance.api, instance.where, [&] { instance.kernel->Compute(context); });
}

void ONNXCOMP_ABI DestroyInstance(void* raw) { delete static_cast<Instance*>(raw); }

OrtStatus* ONNXCOMP_ABI InferInstance(const OrtCustomOp* raw, OrtShapeInferContext* context) {
  const CustomOp& op = Self(raw);
  return Guard(op.api, op.name, [&] { op.infer(InferContext(op.api, context), op); });
}

}  // namespace

CustomOp::CustomOp(const Api& api_in, const char* name_in, std::vector<int> inputs_in,
                   int output_in, Create create_in, Infer infer_in, const char* provider_in,
                   std::vector<size_t> host_in)
    : OrtCustomOp{},
      api(api_in),
      name(name_in),
      inputs(std::move(inputs_in)),
      output(output_in),
      create(create_in),
      infer(infer_in),
      provider(provider_in),
      host(std::move(host_in)) {
  version = kApiVersion;
  GetName = [](const OrtCustomOp* op) { return Self(op).name; };
  GetExecutionProviderType = [](const OrtCustomOp* op) { return Self(op).provider; };
  GetInputType = [](const OrtCustomOp* op, size_t i) { return Self(op).inputs[i]; };
  GetInputTypeCount = [](const OrtCustomOp* op) { return Self(op).inputs.size(); };
  GetOutputType = [](const OrtCustomOp* op, size_t) { return Self(op).output; };
  GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };   // required
  GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };  // required
  GetInputMemoryType = [](const OrtCustomOp* op, size_t i) -> int {
    const std::vector<size_t>& host = Self(op).host;
    return std::find(host.begin(), host.end(), i) == host.end() ? kProvider : kHostInput;
  };
  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
  CreateKernelV2 = CreateInstance;
  KernelComputeV2 = ComputeInstance;
  KernelDestroy = DestroyInstance;
  InferOutputShapeFn = InferInstance;
}

namespace {

// The domain of one copy of the runtime: a process may hold several.
struct Domain {
  std::deque<CustomOp> ops;  // a deque never moves what the runtime points to
  OrtCustomOpDomain* handle = nullptr;
};

OrtCustomOpDomain* BuildDomain(const Api& api, Domain& domain) {
  if (domain.handle != nullptr) return domain.handle;
  domain.ops.clear();
  winding::AddOps(api, domain.ops);
#if !defined(ONNXCOMP_CUDA_EMULATED)
  hyper::AddOps(api, domain.ops);
  hash::AddOps(api, domain.ops);
  sparse::AddOps(api, domain.ops);
  sparse::AddIntOps(api, domain.ops);
#endif
#if defined(ONNXCOMP_CUDA)
  hyper::AddGpuOps(api, domain.ops);
  hash::AddGpuOps(api, domain.ops);
#endif
  OrtCustomOpDomain* handle = nullptr;
  Check(api, api.CreateCustomOpDomain("com.onnxcomp", &handle));
  for (const CustomOp& op : domain.ops) Check(api, api.CustomOpDomainAdd(handle, &op));
  domain.handle = handle;
  return handle;
}

}  // namespace

OrtCustomOpDomain* DomainOf(const Api& api) {
  static std::mutex& mutex = *new std::mutex;
  static auto& domains = *new std::map<const OrtApi*, Domain>;
  const std::lock_guard<std::mutex> lock(mutex);
  KeepLoaded();
  return BuildDomain(api, domains[api.table()]);
}

namespace {

// Session configuration entry of options that have the operators. The runtime ignores its name.
constexpr const char* kMark = "onnxcomp.library_registered";

// The runtime refuses a domain given twice, and several parts of a program may each see to it that
// the operators are known: the second time changes nothing.
void RegisterOnce(const Api& api, OrtSessionOptions* options) {
  for (const char* mark : {kMark, kPluginMark}) {
    int registered = 0;
    Check(api, api.HasSessionConfigEntry(options, mark, &registered));
    if (registered != 0) return;
  }
  Check(api, api.AddCustomOpDomain(options, DomainOf(api)));
  Check(api, api.AddSessionConfigEntry(options, kMark, "1"));
}

}  // namespace
}  // namespace onnxcomp

extern "C" ONNXCOMP_EXPORT OrtStatus* ONNXCOMP_ABI RegisterCustomOps(OrtSessionOptions* options,
                                                                     const OrtApiBase* base) {
  const onnxcomp::Api api(base->GetApi(onnxcomp::kApiVersion));
  if (api.table() == nullptr) {
    // Too old to know this API version; an error status needs a table, so take the oldest one.
    const onnxcomp::Api oldest(base->GetApi(1));
    return oldest.CreateStatus(onnxcomp::kFail, "onnxcomp needs ONNX Runtime 1.18 or newer");
  }
  return onnxcomp::Guard(api, "onnxcomp", [&] { onnxcomp::RegisterOnce(api, options); });
}
