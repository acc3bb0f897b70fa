// What every operator of the library has in common: a declaration, and a kernel behind the ABI.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"
#include "common/attributes.h"
#include "common/error.h"

namespace onnxcomp {

// One node's kernel. `Compute` may run on several threads at once.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void Compute(OrtKernelContext* context) const = 0;
};

// What InferOutputShapeFn may ask, and its answer.
class InferContext {
 public:
  InferContext(const Api& api, OrtShapeInferContext* context) : api_(api), context_(context) {}

  // Dims of an input, -1 where unknown. An input of unknown rank looks like a scalar.
  Dims InputDims(size_t index) const { return Input(index).dims(); }

  // Element type of an input.
  int InputType(size_t index) const {
    int type = kUndefined;
    Check(api_, api_.GetTensorElementType(Input(index).get(), &type));
    return type;
  }

  // Names of the symbolic dims of an input, "" where there is none.
  std::vector<std::string> InputSymbols(size_t index) const {
    ShapeInfo info = Input(index);
    std::vector<const char*> names(info.dims().size(), "");
    if (!names.empty()) {
      Check(api_, api_.GetSymbolicDimensions(info.get(), names.data(), names.size()));
    }
    std::vector<std::string> copies;
    for (const char* name : names) copies.emplace_back(name == nullptr ? "" : name);
    return copies;
  }

  // An attribute of integers; empty when absent.
  Dims Ints(const char* name) const {
    const OrtOpAttr* attribute = nullptr;
    OrtStatus* status = api_.InferGetAttribute(context_, name, &attribute);
    if (status != nullptr) {
      api_.ReleaseStatus(status);
      return {};
    }
    Dims values(8);
    size_t bytes = 0;
    const size_t room = values.size() * sizeof(int64_t);
    status = api_.ReadOpAttr(attribute, kAttributeInts, values.data(), room, &bytes);
    if (status != nullptr) {
      api_.ReleaseStatus(status);
      return {};
    }
    values.resize(bytes / sizeof(int64_t));
    return values;
  }

  // An attribute that is one integer; 0 when absent.
  int64_t Int(const char* name) const {
    const OrtOpAttr* attribute = nullptr;
    int64_t value = 0;
    size_t bytes = 0;
    OrtStatus* status = api_.InferGetAttribute(context_, name, &attribute);
    if (status == nullptr) {
      status = api_.ReadOpAttr(attribute, kAttributeInt, &value, sizeof value, &bytes);
    }
    if (status == nullptr) return value;
    api_.ReleaseStatus(status);
    return 0;
  }

  // Every unknown dim needs a name: ONNX Runtime takes a nameless -1 for a value and then finds
  // Reshape targets with two of them. Names made here are never given twice, so none claims that
  // two dims are equal.
  void SetOutput(int type, const Dims& dims, std::vector<std::string> symbols) const {
    symbols.resize(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) {
      if (dims[i] < 0 && symbols[i].empty()) symbols[i] = FreshSymbol();
    }
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    Check(api_, api_.CreateTensorTypeAndShapeInfo(&raw));
    ShapeInfo info(api_, raw);
    Check(api_, api_.SetTensorElementType(raw, type));
    Check(api_, api_.SetDimensions(raw, dims.data(), dims.size()));
    std::vector<const char*> names;
    for (const std::string& symbol : symbols) names.push_back(symbol.c_str());
    if (!names.empty()) Check(api_, api_.SetSymbolicDimensions(raw, names.data(), names.size()));
    Check(api_, api_.InferSetOutput(context_, 0, raw));
  }

 private:
  static std::string FreshSymbol() {
    static std::atomic<uint64_t> count{0};
    return "onnxcomp_unknown_" + std::to_string(count++);
  }

  ShapeInfo Input(size_t index) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    Check(api_, api_.InferGetInput(context_, index, &info));
    return ShapeInfo(api_, info, /*owned=*/false);
  }

  Api api_;
  OrtShapeInferContext* context_;
};

// One operator for one combination of element types, as the runtime sees it. The base comes first
// so that a pointer to one is a pointer to the other.
struct CustomOp : OrtCustomOp {
  using Create = std::unique_ptr<Kernel> (*)(const NodeInfo& node, const CustomOp& op);
  using Infer = void (*)(const InferContext& context, const CustomOp& op);

  // `provider` is null for the CPU; inputs whose index is in `host` lie in its memory in any case.
  CustomOp(const Api& api, const char* name, std::vector<int> inputs, int output, Create create,
           Infer infer, const char* provider = nullptr, std::vector<size_t> host = {});

  Api api;
  const char* name;
  std::vector<int> inputs;
  int output;
  Create create;
  Infer infer;
  const char* provider;
  std::vector<size_t> host;
};

// The domain with all operators, made once for each copy of the runtime in the process. It lives as
// long as the process (the library is never unloaded), because sessions refer to it.
OrtCustomOpDomain* DomainOf(const Api& api);

// Session configuration entry that the runtime makes when our execution provider (plugin.cc) is
// added to options: its prefix for options of that provider, and the name of the one it has.
constexpr const char* kPluginMark = "ep.onnxcompexecutionprovider.operators";

}  // namespace onnxcomp
