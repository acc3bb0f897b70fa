// WindingDecode for the CPU provider; spec.md defines it.

#include "winding/kernel.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/float16.h"
#include "common/parallel.h"

namespace onnxcomp::winding {
namespace {

constexpr int64_t kPairs = 8;  // of a block
constexpr int64_t kMaxPairBits = 16;
constexpr int64_t kMaxOrder = int64_t{1} << 31;
constexpr int64_t kMaxExtent = int64_t{1} << 40;
// Blocks decoded by one task: some ten microseconds of work.
constexpr int64_t kTaskBlocks = 2048;

enum Input : size_t { kCodes, kScales, kCentre, kSpans, kGenerator, kSizes };

struct Place {
  float x, y;  // relative to the centre of the box
};

// A weight as the runtime holds it now, checked.
struct Weight {
  const uint8_t* codes;
  const uint16_t* scales;
  const float* centre;
  const float* spans;
  int64_t groups, blocks, bits, classes;
  std::vector<Place> places;
};

// Places of all indices, so that decoding a pair is one look-up.
std::vector<Place> Places(int64_t count, int64_t order, const int64_t* generator) {
  std::vector<Place> places(static_cast<size_t>(count));
  places[0] = {0.0f, 0.0f};
  for (int64_t i = 1; i < count; ++i) {
    const float whole = static_cast<float>(order);
    const float x = static_cast<float>((i - 1) * generator[0] % order) / whole;
    const float y = static_cast<float>((i - 1) * generator[1] % order) / whole;
    places[static_cast<size_t>(i)] = {x - 0.5f, y - 0.5f};
  }
  return places;
}

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
    const Weight weight = Read(context);
    float* w = OutputOf<float>(api_, context, extent_);
    const int64_t blocks = weight.groups * weight.blocks;
    std::atomic<bool> valid{true};
    ParallelPieces(api_, context, blocks, kTaskBlocks, [&](int64_t i) {
      if (!Block(weight, i, w)) valid = false;
    });
    if (!valid) Fail("a code lies in a class beyond the ", weight.classes, " of 'spans'");
  }

 private:
  static bool InRange(int64_t size) { return size >= 1 && size <= kMaxExtent; }

  Dims Shape(OrtKernelContext* context, Input input) const {
    return DimsOf(api_, InputOf(api_, context, input));
  }

  template <class T>
  const T* Data(OrtKernelContext* context, Input input) const {
    return DataOf<T>(api_, InputOf(api_, context, input));
  }

  void Expect(OrtKernelContext* context, Input input, const char* name, const Dims& dims) const {
    const Dims found = Shape(context, input);
    if (found != dims) Fail(name, " has shape ", Text(found), ", must be ", Text(dims));
  }

  Weight Read(OrtKernelContext* context) const {
    const Dims codes = Shape(context, kCodes);
    if (codes.size() != 3 || codes[2] < 1 || codes[2] > kMaxPairBits) {
      Fail("codes have shape ", Text(codes), ", must be (groups, blocks, 1 to 16 bytes)");
    }
    const int64_t pairs = codes[0] * codes[1] * kPairs;
    const int64_t weights = extent_[0] * extent_[1];
    if (2 * pairs < weights) Fail("codes hold ", 2 * pairs, " weights, extent asks for ", weights);
    Expect(context, kScales, "scales", {codes[0], 1, 1});
    Expect(context, kCentre, "centre", {2});
    Expect(context, kGenerator, "generator", {2});
    Expect(context, kSizes, "sizes", {3});
    const Dims spans = Shape(context, kSpans);
    if (spans.size() != 1 || spans[0] < 1) Fail("spans have shape ", Text(spans));
    return {Data<uint8_t>(context, kCodes),  Data<uint16_t>(context, kScales),
            Data<float>(context, kCentre),   Data<float>(context, kSpans),
            codes[0], codes[1], codes[2],    spans[0],
            ReadPlaces(context, codes[2])};
  }

  std::vector<Place> ReadPlaces(OrtKernelContext* context, int64_t bits) const {
    const int64_t* sizes = Data<int64_t>(context, kSizes);
    const int64_t* generator = Data<int64_t>(context, kGenerator);
    if (sizes[0] != int64_t{1} << bits || sizes[1] < 1 || sizes[1] > sizes[0] || sizes[2] < 1 ||
        sizes[2] > kMaxOrder) {
      Fail("sizes are (", sizes[0], ", ", sizes[1], ", ", sizes[2], "), must be 2^", bits,
           ", 1 to that, and 1 to 2^31");
    }
    for (int i = 0; i < 2; ++i) {
      if (generator[i] < 0 || generator[i] > kMaxOrder) {
        Fail("generator[", i, "] is ", generator[i], ", must be 0 to 2^31");
      }
    }
    return Places(sizes[1], sizes[2], generator);
  }

  // Decodes eight pairs; false when a class does not exist.
  bool Block(const Weight& weight, int64_t block, float* w) const {
    const int64_t weights = extent_[0] * extent_[1];
    uint8_t bytes[kMaxPairBits + 8] = {};
    std::memcpy(bytes, weight.codes + block * weight.bits, static_cast<size_t>(weight.bits));
    const float scale = HalfToFloat(weight.scales[block / weight.blocks]);
    const auto count = static_cast<int64_t>(weight.places.size());
    bool valid = true;
    float out[2 * kPairs];
    for (int64_t i = 0; i < kPairs; ++i) {
      const int64_t bit = i * weight.bits;
      const uint8_t* at = bytes + bit / 8;
      const uint32_t word = at[0] | static_cast<uint32_t>(at[1]) << 8 |
                            static_cast<uint32_t>(at[2]) << 16;
      const int64_t code = (word >> (bit % 8)) & ((uint32_t{1} << weight.bits) - 1);
      int64_t number = code / count;
      if (number >= weight.classes) valid = false, number = 0;
      const Place place = weight.places[static_cast<size_t>(code % count)];
      const float span = scale * weight.spans[number];
      out[2 * i] = place.x * span + weight.centre[0];
      out[2 * i + 1] = place.y * span + weight.centre[1];
    }
    const int64_t first = block * 2 * kPairs;
    const int64_t kept = std::clamp<int64_t>(weights - first, 0, 2 * kPairs);
    std::memcpy(w + first, out, static_cast<size_t>(kept) * sizeof(float));
    return valid;
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
  const std::vector<int> inputs = {kUint8, kFloat16, kFloat, kFloat, kInt64,
                                   kInt64, kFloat,   kInt64, kInt64};
  ops.emplace_back(api, "WindingDecode", inputs, kFloat, Make, Infer);
}

}  // namespace onnxcomp::winding
