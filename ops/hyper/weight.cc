// Checks everything a model file can get wrong before a kernel touches a byte of it.

#include "common/weight_op.h"
#include "hyper/kernel.h"

namespace onnxcomp::hyper {
namespace {

constexpr int64_t kMaxExtent = int64_t{1} << 40;

int ReadGroup(const NodeInfo& node) {
  const auto group = node.Int("group");
  if (!group) Fail("attribute 'group' (int) is missing");
  if (*group != 32 && *group != 64 && *group != 128 && *group != 256) {
    Fail("attribute 'group' is ", *group, ", must be 32, 64, 128 or 256");
  }
  return static_cast<int>(*group);
}

// log2 of the table's length, 0 when it is none of the known ones.
int StatesOf(const Dims& table) {
  if (table.size() != 1) return 0;
  for (int states : {6, 7, 8, 10, 12}) {
    if (table[0] == int64_t{1} << states) return states;
  }
  return 0;
}

// |h| < 2^15 in spec.md rests on |q| <= 127.
void CheckTable(const int8_t* table, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (table[i] == -128) Fail("table[", i, "] is -128, entries must be -127 .. 127");
  }
}

}  // namespace

void CheckColumns(const NodeInfo& node, int64_t length) {
  const auto columns = node.Ints("columns");
  if (columns && *columns != Dims{length}) {
    Fail("attribute 'columns' is ", Text(*columns), ", must be ", Text({length}));
  }
}

std::vector<int> WithWeight(std::vector<int> inputs) {
  inputs.insert(inputs.end(), {kUint8, kFloat16, kInt8, kInt64, kInt64, kUint8, kFloat, kFloat,
                               kFloat});
  return inputs;
}

WeightReader::WeightReader(const NodeInfo& node, size_t first, bool readable)
    : api_(node.api()), first_(first), readable_(readable) {
  const Dims extent = ReadExtent(node, kMaxExtent);
  rows_ = extent[0];
  length_ = extent[1];
  group_ = ReadGroup(node);
  if (!readable) return;
  const OrtValue* values[3] = {};
  for (size_t i = 0; i < 3; ++i) {
    values[i] = node.Constant(first + i);
    if (values[i] == nullptr) return;  // made by another node: checked at each run
  }
  format_ = Validate(DimsOf(api_, values[0]), DimsOf(api_, values[1]), DimsOf(api_, values[2]));
  const auto* table = DataOf<int8_t>(api_, values[2]);
  CheckTable(table, int64_t{1} << format_.states);
  leveled_ = levels_.Find(table, format_.states);
  structured_ = structure_.Find(table, format_.states, format_.bits);
  constant_ = true;
}

Format WeightReader::Validate(const Dims& codes, const Dims& scales, const Dims& table) const {
  Format format{};
  format.rows = rows_;
  format.length = length_;
  format.group = group_;
  format.panels = (rows_ + kLanes - 1) / kLanes;
  format.groups = (length_ + group_ - 1) / group_;
  if (codes.size() != 5 || codes[0] != format.panels || codes[1] != format.groups ||
      codes[3] != kLanes || codes[4] != 4) {
    Fail("codes have shape ", Text(codes), ", extent ", Text({rows_, length_}), " in groups of ",
         group_, " needs (", format.panels, ", ", format.groups, ", D, 16, 4)");
  }
  if (codes[2] < 1 || codes[2] > 6 * group_ / 32 || codes[2] * 32 % group_ != 0) {
    Fail("codes have shape ", Text(codes), ": ", codes[2], " dwords are not 1 .. 6 bits for each of ",
         group_, " weights");
  }
  format.dwords = static_cast<int>(codes[2]);
  format.bits = format.dwords * 32 / group_;
  if (scales != Dims{format.panels, format.groups, kLanes, 1}) {
    Fail("scales have shape ", Text(scales), ", must be ",
         Text({format.panels, format.groups, kLanes, 1}));
  }
  format.states = StatesOf(table);
  if (format.states == 0) {
    Fail("table has shape ", Text(table), ", must have 64, 128, 256, 1024 or 4096 entries");
  }
  if (format.states < format.bits + 2) {
    Fail("table of ", table[0], " entries is too short for ", format.bits, " bits per weight");
  }
  return format;
}

Weight WeightReader::Known() const {
  return {format_, nullptr, nullptr, nullptr, leveled_ ? &levels_ : nullptr,
          structured_ ? &structure_ : nullptr};
}

Weight WeightReader::Read(const OrtKernelContext* context) const {
  const OrtValue* codes = InputOf(api_, context, first_);
  const OrtValue* scales = InputOf(api_, context, first_ + 1);
  const OrtValue* table = InputOf(api_, context, first_ + 2);
  Weight weight = Known();
  weight.codes = DataOf<uint8_t>(api_, codes);
  weight.scales = DataOf<uint16_t>(api_, scales);
  weight.table = DataOf<int8_t>(api_, table);
  if (!constant_) {
    weight.format = Validate(DimsOf(api_, codes), DimsOf(api_, scales), DimsOf(api_, table));
    if (readable_) CheckTable(weight.table, int64_t{1} << weight.format.states);
  }
  return weight;
}

}  // namespace onnxcomp::hyper
