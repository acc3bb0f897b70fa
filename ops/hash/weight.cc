// Checks everything a model file can get wrong before a kernel touches a byte of it.

#include <cmath>

#include "common/weight_op.h"
#include "hash/kernel.h"

namespace onnxcomp::hash {
namespace {

constexpr int64_t kMaxExtent = int64_t{1} << 34;
constexpr int64_t kMaxMap = int64_t{1} << 31;

void ReadMemory(const Dims& dims, Weight& weight) {
  if (dims.size() != 2 || dims[0] < 1 || dims[0] >= kMaxMap) {
    Fail("memory has shape ", Text(dims), ", must be (slots, chunk)");
  }
  const int64_t chunk = dims[1];
  if (chunk < 4 || chunk > kTile || (chunk & (chunk - 1)) != 0) {
    Fail("memory has chunks of ", chunk, " weights, must be a power of two from 4 to 256");
  }
  weight.slots = dims[0];
  weight.chunk = static_cast<int>(chunk);
}

void ReadMap(const Dims& dims, const int64_t* values, Weight& weight) {
  if (dims != Dims{6}) Fail("map has shape ", Text(dims), ", must be (6,)");
  const Map map{values[0], values[1], values[2], values[3], values[4], values[5]};
  for (int i = 0; i < 6; ++i) {
    const int64_t least = i == 1 ? 1 : 0;
    const int64_t end = i == 5 ? 2 : kMaxMap;
    if (values[i] < least || values[i] >= end) {
      Fail("map[", i, "] is ", values[i], ", must be ", least, " .. ", end - 1);
    }
  }
  weight.map = map;
}

// One code for each chunk, or a single zero for none. Null codes cannot be read: of the only chunk
// they count, since a zero changes nothing; else a single one is taken for zero.
bool HasCodes(const Dims& dims, const uint8_t* codes, const Weight& weight) {
  const bool zero = dims == Dims{1, 1, 1} && (codes == nullptr || codes[0] == 0);
  if (dims == Dims{weight.panels, weight.blocks, weight.parts()}) {
    return codes == nullptr || !zero;
  }
  if (zero) return false;
  Fail("codes have shape ", Text(dims), ", must be ",
       Text({weight.panels, weight.blocks, weight.parts()}), ", or (1, 1, 1) and zero");
}

}  // namespace

std::vector<int> WithWeight(std::vector<int> inputs, int memory) {
  inputs.insert(inputs.end(), {memory, kFloat, kUint8, kInt64, kInt64, kInt64, kInt64, kInt64,
                               kInt64, kInt64});
  return inputs;
}

void CheckPrecision(bool int8, Memory memory) {
  if (int8 && memory != Memory::kInt8) {
    Fail("attribute 'precision' is 1 (int8), which needs a memory of int8");
  }
}

WeightReader::WeightReader(const NodeInfo& node, size_t first, Memory type, bool readable)
    : api_(node.api()), first_(first), type_(type), readable_(readable) {
  const Dims extent = ReadExtent(node, kMaxExtent);
  rows_ = extent[0];
  length_ = extent[1];
  if (CeilDiv(rows_, kLanes) > kMaxMap / CeilDiv(length_, kLanes)) {
    Fail("attribute 'extent' is ", Text(extent), ": more than 2^31 tiles");
  }
}

Weight WeightReader::Read(const OrtKernelContext* context) const {
  const OrtValue* memory = InputOf(api_, context, first_);
  const OrtValue* scale = InputOf(api_, context, first_ + 1);
  const OrtValue* codes = InputOf(api_, context, first_ + 2);
  const OrtValue* map = InputOf(api_, context, first_ + 3);
  Weight weight{};
  weight.rows = rows_;
  weight.length = length_;
  weight.panels = CeilDiv(rows_, kLanes);
  weight.blocks = CeilDiv(length_, kLanes);
  weight.type = type_;
  weight.memory = DataOf<char>(api_, memory);
  ReadMemory(DimsOf(api_, memory), weight);
  const Dims scale_dims = DimsOf(api_, scale);
  if (scale_dims != Dims{1}) Fail("scale has shape ", Text(scale_dims), ", must be (1,)");
  weight.scale = *DataOf<float>(api_, scale);
  if (!std::isfinite(weight.scale)) Fail("scale is ", weight.scale);
  ReadMap(DimsOf(api_, map), DataOf<int64_t>(api_, map), weight);
  const Dims code_dims = DimsOf(api_, codes);
  if (Count(code_dims) == 0) Fail("codes have shape ", Text(code_dims));
  const uint8_t* data = DataOf<uint8_t>(api_, codes);
  weight.codes = HasCodes(code_dims, readable_ ? data : nullptr, weight) ? data : nullptr;
  return weight;
}

}  // namespace onnxcomp::hash
