// SparseDecode for the CPU provider; spec.md defines it.

#include <algorithm>

#include "common/parallel.h"
#include "common/weight_op.h"
#include "sparse/kernel.h"
#include "sparse/mask.h"

namespace onnxcomp::sparse {
namespace {

constexpr int64_t kMaxExtent = int64_t{1} << 40;
// Elements decoded by one task: some ten microseconds of work.
constexpr int64_t kTaskWork = int64_t{1} << 15;

enum Input : size_t { kMask, kValues };

// `T` is an unsigned integer of the width of the elements: bits are moved, never computed with.
template <class T>
class DecodeKernel : public Kernel {
 public:
  explicit DecodeKernel(const NodeInfo& node) : api_(node.api()) {
    extent_ = ReadExtent(node, kMaxExtent);
    bytes_ = CeilDiv(extent_[1], 8);
    const OrtValue* mask = node.Constant(kMask);
    const OrtValue* values = node.Constant(kValues);
    if (mask == nullptr || values == nullptr) return;  // made by another node: checked at each run
    starts_ = Starts(mask, values);
  }

  void Compute(OrtKernelContext* context) const override {
    const OrtValue* mask = InputOf(api_, context, kMask);
    const OrtValue* values = InputOf(api_, context, kValues);
    std::vector<int64_t> found;
    if (starts_.empty()) found = Starts(mask, values);
    const int64_t* starts = starts_.empty() ? found.data() : starts_.data();
    const uint8_t* bits = DataOf<uint8_t>(api_, mask);
    const T* kept = DataOf<T>(api_, values);
    T* w = OutputOf<T>(api_, context, extent_);
    ParallelPieces(api_, context, extent_[0], kTaskWork / extent_[1], [&](int64_t row) {
      Row(bits + row * bytes_, kept + starts[row], w + row * extent_[1]);
    });
  }

 private:
  std::vector<int64_t> Starts(const OrtValue* mask, const OrtValue* values) const {
    const Dims wanted{extent_[0], bytes_};
    const Dims found = DimsOf(api_, mask);
    if (found != wanted) Fail("mask has shape ", Text(found), ", must be ", Text(wanted));
    std::vector<int64_t> starts = RowStarts(DataOf<uint8_t>(api_, mask), extent_[0], bytes_, extent_[1]);
    const Dims held = DimsOf(api_, values);
    if (held != Dims{starts.back() + 1}) {
      Fail("values have shape ", Text(held), ", the mask asks for ", Text({starts.back() + 1}));
    }
    if (DataOf<T>(api_, values)[0] != 0) Fail("values[0] is not zero");
    return starts;
  }

  // Decodes a row; `kept` is the element before its first one, and always there: values[0] is.
  void Row(const uint8_t* mask, const T* kept, T* out) const {
    for (int64_t byte = 0; byte < bytes_; byte += 8) {
      const uint64_t word = LoadBits(mask + byte, bytes_ - byte);
      const int64_t width = std::min<int64_t>(64, extent_[1] - 8 * byte);
      for (int64_t i = 0; i < width; ++i) {
        const uint64_t bit = word >> i & 1u;
        kept += bit;
        *out++ = static_cast<T>(*kept & (T{0} - static_cast<T>(bit)));
      }
    }
  }

  Api api_;
  Dims extent_;
  int64_t bytes_ = 0;
  std::vector<int64_t> starts_;  // empty where mask or values are not constant
};

// The runtime asks one of the overloads for all of them: the type of the weight is that of `values`.
void Infer(const InferContext& context, const CustomOp&) {
  const Dims extent = context.Ints("extent");
  if (Positive(extent)) context.SetOutput(context.InputType(kValues), extent, {});
}

template <class T>
void AddDecode(const Api& api, int type, std::deque<CustomOp>& ops) {
  ops.emplace_back(api, "SparseDecode", std::vector<int>{kUint8, type, kUint8, kInt64}, type,
                   Make<DecodeKernel<T>>, Infer);
}

}  // namespace

void AddOps(const Api& api, std::deque<CustomOp>& ops) {
  AddDecode<uint32_t>(api, kFloat, ops);
  AddDecode<uint16_t>(api, kFloat16, ops);
  AddDecode<uint16_t>(api, kBfloat16, ops);
}

}  // namespace onnxcomp::sparse
