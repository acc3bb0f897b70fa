// Views of the runtime's tensors.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "abi.h"
#include "common/error.h"

namespace onnxcomp {

using Dims = std::vector<int64_t>;

// "(2, 3)" for messages.
inline std::string Text(const Dims& dims) {
  std::string text = "(";
  for (size_t i = 0; i < dims.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  }
  return text + (dims.size() == 1 ? ",)" : ")");
}

// Number of elements; dims of an existing tensor never overflow.
inline int64_t Count(const Dims& dims) {
  int64_t count = 1;
  for (int64_t dim : dims) count *= dim;
  return count;
}

// Owns what the runtime hands out about a type and shape.
class ShapeInfo {
 public:
  ShapeInfo(const Api& api, OrtTensorTypeAndShapeInfo* info, bool owned = true)
      : api_(api), info_(info), owned_(owned) {}
  ~ShapeInfo() {
    if (owned_) api_.ReleaseTensorTypeAndShapeInfo(info_);
  }
  ShapeInfo(const ShapeInfo&) = delete;
  ShapeInfo& operator=(const ShapeInfo&) = delete;

  OrtTensorTypeAndShapeInfo* get() const { return info_; }

  Dims dims() const {
    size_t rank = 0;
    Check(api_, api_.GetDimensionsCount(info_, &rank));
    Dims dims(rank);
    if (rank > 0) Check(api_, api_.GetDimensions(info_, dims.data(), rank));
    return dims;
  }

 private:
  Api api_;
  OrtTensorTypeAndShapeInfo* info_;
  bool owned_;
};

inline Dims DimsOf(const Api& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(api, api.GetTensorTypeAndShape(value, &info));
  return ShapeInfo(api, info).dims();
}

template <class T>
const T* DataOf(const Api& api, const OrtValue* value) {
  void* data = nullptr;
  // The runtime has no const accessor this old; nothing here writes to an input.
  Check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return static_cast<const T*>(data);
}

inline const OrtValue* InputOf(const Api& api, const OrtKernelContext* context, size_t index) {
  const OrtValue* value = nullptr;
  Check(api, api.GetInput(context, index, &value));
  if (value == nullptr) Fail("input ", index, " is missing");
  return value;
}

// Allocates output 0 and returns its data (which may be null when it is empty).
template <class T>
T* OutputOf(const Api& api, OrtKernelContext* context, const Dims& dims) {
  OrtValue* value = nullptr;
  Check(api, api.GetOutput(context, 0, dims.data(), dims.size(), &value));
  void* data = nullptr;
  Check(api, api.GetTensorMutableData(value, &data));
  return static_cast<T*>(data);
}

}  // namespace onnxcomp
