// Attributes and constant inputs of a node, read when its kernel is created.
#pragma once

#include <optional>
#include <string>

#include "common/tensor.h"

namespace onnxcomp {

class NodeInfo {
 public:
  NodeInfo(const Api& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  const Api& api() const { return api_; }

  std::string name() const {
    size_t size = 0;
    Check(api_, api_.KernelInfoGetNodeName(info_, nullptr, &size));
    std::string name(size, '\0');
    if (size > 0) Check(api_, api_.KernelInfoGetNodeName(info_, name.data(), &size));
    while (!name.empty() && name.back() == '\0') name.pop_back();
    return name;
  }

  std::optional<int64_t> Int(const char* name) const {
    int64_t value = 0;
    if (!Found(api_.KernelInfoGetInt(info_, name, &value))) return std::nullopt;
    return value;
  }

  std::optional<Dims> Ints(const char* name) const {
    size_t size = 0;
    if (!Found(api_.KernelInfoGetInts(info_, name, nullptr, &size))) return std::nullopt;
    Dims values(size);
    if (size > 0) Check(api_, api_.KernelInfoGetInts(info_, name, values.data(), &size));
    return values;
  }

  // The allocator of the memory that the node's provider computes in. The caller releases it.
  OrtAllocator* Allocator() const {
    OrtAllocator* allocator = nullptr;
    Check(api_, api_.KernelInfoGetAllocator(info_, kProvider, &allocator));
    return allocator;
  }

  // The tensor behind an input that never changes, or null.
  const OrtValue* Constant(size_t index) const {
    int constant = 0;
    const OrtValue* value = nullptr;
    Check(api_, api_.KernelInfoGetConstantInput(info_, index, &constant, &value));
    return constant != 0 ? value : nullptr;
  }

 private:
  // The runtime reports an absent attribute (or one of another type) as an error.
  bool Found(OrtStatus* status) const {
    if (status == nullptr) return true;
    api_.ReleaseStatus(status);
    return false;
  }

  Api api_;
  const OrtKernelInfo* info_;
};

}  // namespace onnxcomp
