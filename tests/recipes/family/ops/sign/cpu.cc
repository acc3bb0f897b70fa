// SignDecode for the CPU provider; spec.md defines it.

#include "sign/kernel.h"

#include "common/parallel.h"

namespace onnxcomp::sign {
namespace {

constexpr int64_t kMaxExtent = int64_t{1} << 40;
// Rows decoded by one task.
constexpr int64_t kTaskRows = 64;

enum Input : size_t { kSigns, kScale };

class DecodeKernel : public Kernel {
 public:
  explicit DecodeKernel(const NodeInfo& node) : api_(node.api()) {
    const auto extent = node.Ints("extent");
    if (!extent) Fail("attribute 'extent' (ints: rows, length) is missing");
    if (extent->size() != 2 || !InRange((*extent)[0]) || !InRange((*extent)[1]) ||
        (*extent)[0] > kMaxExtent / (*extent)[1]) {
      Fail("attribute 'extent' is ", Text(*extent), ", must be rows >= 1 and length >= 1");
    }
    extent_ = *extent;
  }

  void Compute(OrtKernelContext* context) const override {
    const int64_t rows = extent_[0], length = extent_[1], stride = (length + 7) / 8;
    const auto* signs = Data<uint8_t>(context, kSigns, "signs", {rows, stride});
    const auto* scale = Data<float>(context, kScale, "scale", {rows, 1});
    float* w = OutputOf<float>(api_, context, extent_);
    ParallelPieces(api_, context, rows, kTaskRows, [&](int64_t r) {
      for (int64_t c = 0; c < length; ++c) {
        const bool minus = (signs[r * stride + c / 8] >> (7 - c % 8) & 1) != 0;
        w[r * length + c] = minus ? -scale[r] : scale[r];
      }
    });
  }

 private:
  static bool InRange(int64_t size) { return size >= 1 && size <= kMaxExtent; }

  template <class T>
  const T* Data(OrtKernelContext* context, Input input, const char* name, const Dims& dims) const {
    const OrtValue* value = InputOf(api_, context, input);
    const Dims found = DimsOf(api_, value);
    if (found != dims) Fail(name, " has shape ", Text(found), ", must be ", Text(dims));
    return DataOf<T>(api_, value);
  }

  Api api_;
  Dims extent_;
};

std::unique_ptr<Kernel> Make(const NodeInfo& node, const CustomOp&) {
  return std::make_unique<DecodeKernel>(node);
}

void Infer(const InferContext& context, const CustomOp& op) {
  const Dims extent = context.Ints("extent");
  if (extent.size() == 2 && extent[0] > 0 && extent[1] > 0) {
    context.SetOutput(op.output, extent, {});
  }
}

}  // namespace

void AddOps(const Api& api, std::deque<CustomOp>& ops) {
  ops.emplace_back(api, "SignDecode", std::vector<int>{kUint8, kFloat}, kFloat, Make, Infer);
}

}  // namespace onnxcomp::sign
