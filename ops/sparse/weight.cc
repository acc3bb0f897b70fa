// Checks everything a model file can get wrong before a kernel touches a byte of it, and makes rows of
// integers dense.

#include <algorithm>
#include <cstring>

#include "common/weight_op.h"
#include "sparse/format.h"
#include "sparse/kernel.h"
#include "sparse/mask.h"

namespace onnxcomp::sparse {
namespace {

constexpr int64_t kMaxExtent = int64_t{1} << 40;
constexpr int kPairs = 3;          // groups of four elements in a byte of the mask
constexpr int kPatterns = 6 * 6 * 6;
constexpr int64_t kPairedColumns = 4 * kPairs;
constexpr int64_t kPairedCodes = 2 * kPairs;

// Which of four elements are kept, in the order of their numbers.
constexpr uint8_t kTwoOfFour[6] = {0x3, 0x5, 0x9, 0x6, 0xa, 0xc};

// The twelve bits of each byte of a mask of pairs.
struct PairedBits {
  uint16_t bits[256] = {};

  PairedBits() {
    for (int byte = 0; byte < kPatterns; ++byte) {
      bits[byte] = static_cast<uint16_t>(kTwoOfFour[byte % 6] | kTwoOfFour[byte / 6 % 6] << 4 |
                                         kTwoOfFour[byte / 36] << 8);
    }
  }
};

const PairedBits& AllPairedBits() {
  static const PairedBits bits;
  return bits;
}

// Bytes of a mask of pairs that make three whole words.
constexpr int64_t kPairedBytes = 16;

void JoinPaired(const PairedBits& table, const uint8_t* mask, uint64_t* words) {
  const auto at = [&](int i) { return static_cast<uint64_t>(table.bits[mask[i]]); };
  const uint64_t fifth = at(5), tenth = at(10);
  words[0] = at(0) | at(1) << 12 | at(2) << 24 | at(3) << 36 | at(4) << 48 | fifth << 60;
  words[1] = fifth >> 4 | at(6) << 8 | at(7) << 20 | at(8) << 32 | at(9) << 44 | tenth << 56;
  words[2] = tenth >> 8 | at(11) << 4 | at(12) << 16 | at(13) << 28 | at(14) << 40 | at(15) << 52;
}

int ReadOneOf(const NodeInfo& node, const char* name, std::initializer_list<int> allowed) {
  const auto value = node.Int(name);
  if (!value) Fail("attribute '", name, "' (int) is missing");
  for (const int one : allowed) {
    if (*value == one) return one;
  }
  Fail("attribute '", name, "' is ", *value, ", which is none of the values it may have");
}

bool ReadPaired(const NodeInfo& node) {
  const auto pattern = node.Ints("pattern");
  if (!pattern) Fail("attribute 'pattern' (ints: n, m) is missing");
  if (*pattern == Dims{2, 4}) return true;
  if (*pattern != Dims{0, 8}) Fail("attribute 'pattern' is ", Text(*pattern));
  return false;
}

IntFormat ReadFormat(const NodeInfo& node) {
  const Dims extent = ReadExtent(node, kMaxExtent);
  IntFormat format{};
  format.rows = extent[0];
  format.length = extent[1];
  format.group = ReadOneOf(node, "group", {64, 128, kMostGroup});
  format.bits = ReadOneOf(node, "bits", {4, 8});
  format.paired = ReadPaired(node);
  format.groups = CeilDiv(format.length, format.group);
  format.padded = format.groups * format.group;
  format.bytes = CeilDiv(format.padded, format.paired ? kPairedColumns : 8);
  return format;
}

std::vector<int64_t> PairedStarts(const uint8_t* mask, const IntFormat& format) {
  std::vector<int64_t> starts(static_cast<size_t>(format.rows) + 1);
  for (int64_t i = 0; i < format.rows * format.bytes; ++i) {
    if (mask[i] >= kPatterns) {
      Fail("mask has the pattern ", static_cast<int>(mask[i]), ", there are ", kPatterns);
    }
  }
  for (int64_t row = 0; row <= format.rows; ++row) {
    starts[static_cast<size_t>(row)] = row * format.bytes * kPairedCodes;
  }
  return starts;
}

void Unpack(const uint8_t* packed, int64_t bytes, int8_t* out) {
  for (int64_t i = 0; i < bytes; ++i) {
    out[2 * i] = static_cast<int8_t>(((packed[i] & 15) ^ 8) - 8);
    out[2 * i + 1] = static_cast<int8_t>(((packed[i] >> 4) ^ 8) - 8);
  }
}

}  // namespace

IntReader::IntReader(const NodeInfo& node, size_t first)
    : api_(node.api()), first_(first), format_(ReadFormat(node)) {
  const OrtValue* mask = node.Constant(first);
  const OrtValue* codes = node.Constant(first + 1);
  if (mask == nullptr || codes == nullptr) return;  // made by another node: checked at each run
  starts_ = Starts(mask, codes);
}

std::vector<int64_t> IntReader::Starts(const OrtValue* mask, const OrtValue* codes) const {
  const Dims wanted{format_.rows, format_.bytes};
  const Dims found = DimsOf(api_, mask);
  if (found != wanted) Fail("mask has shape ", Text(found), ", must be ", Text(wanted));
  const uint8_t* bits = DataOf<uint8_t>(api_, mask);
  std::vector<int64_t> starts =
      format_.paired ? PairedStarts(bits, format_)
                     : RowStarts(bits, format_.rows, format_.bytes, format_.length);
  for (int64_t& start : starts) ++start;  // the zero in front
  const int64_t bytes = CeilDiv(starts.back() * format_.bits, 8);
  const Dims held = DimsOf(api_, codes);
  if (held != Dims{bytes}) {
    Fail("codes have shape ", Text(held), ", the mask asks for ", Text({bytes}));
  }
  const uint8_t* data = DataOf<uint8_t>(api_, codes);
  if ((data[0] & (format_.bits == 8 ? 255 : 15)) != 0) Fail("the first code is not zero");
  // Products of bytes rest on |code| <= 127.
  if (format_.bits == 8 && std::memchr(data, 0x80, static_cast<size_t>(bytes)) != nullptr) {
    Fail("a code is -128, codes must be -127 .. 127");
  }
  return starts;
}

void IntReader::CheckScales(const OrtValue* scales) const {
  const Dims wanted{format_.rows, format_.groups, 1};
  const Dims found = DimsOf(api_, scales);
  if (found != wanted) Fail("scales have shape ", Text(found), ", must be ", Text(wanted));
}

IntWeight IntReader::Read(const OrtKernelContext* context, std::vector<int64_t>& own) const {
  const OrtValue* mask = InputOf(api_, context, first_);
  const OrtValue* codes = InputOf(api_, context, first_ + 1);
  const OrtValue* scales = InputOf(api_, context, first_ + 2);
  CheckScales(scales);
  if (starts_.empty()) own = Starts(mask, codes);
  return {DataOf<uint8_t>(api_, mask), DataOf<uint8_t>(api_, codes),
          DataOf<uint16_t>(api_, scales), starts_.empty() ? own.data() : starts_.data()};
}

RowMaker::RowMaker(const Isa& isa, const IntFormat& format, const IntWeight& weight)
    : isa_(isa),
      format_(format),
      weight_(weight),
      dense_(format.padded),
      unpacked_(format.bits == 4 ? format.padded + 2 * kWord : 0),
      words_(format.paired ? 3 * CeilDiv(format.bytes, kPairedBytes) : 0),
      scales_(format.groups + kLanes) {
  std::fill_n(scales_.get() + format.groups, kLanes, 0.0f);
}

const uint8_t* RowMaker::Bits(int64_t row) const {
  const uint8_t* mask = weight_.mask + row * format_.bytes;
  if (!format_.paired) return mask;
  const PairedBits& table = AllPairedBits();
  uint64_t* words = words_.get();
  int64_t i = 0;
  for (; i + kPairedBytes <= format_.bytes; i += kPairedBytes, words += 3) {
    JoinPaired(table, mask + i, words);
  }
  if (i < format_.bytes) {
    uint8_t last[kPairedBytes] = {};
    std::memcpy(last, mask + i, static_cast<size_t>(format_.bytes - i));
    JoinPaired(table, last, words);
  }
  return reinterpret_cast<const uint8_t*>(words_.get());
}

const int8_t* RowMaker::Codes(int64_t row) const {
  const uint8_t* bits = Bits(row);
  const int64_t words = format_.padded / kWord;
  const int64_t start = weight_.starts[row], end = weight_.starts[row + 1];
  if (format_.bits == 4) {
    const int64_t first = start / 2, odd = start % 2;
    Unpack(weight_.codes + first, CeilDiv(end, 2) - first, unpacked_.get());
    isa_.expand(bits, words, unpacked_.get() + odd, dense_.get());
    return dense_.get();
  }
  const auto* codes = reinterpret_cast<const int8_t*>(weight_.codes + start);
  const bool room = weight_.starts[format_.rows] - end >= isa_.slack;
  (room ? isa_ : PlainIsa()).expand(bits, words, codes, dense_.get());
  return dense_.get();
}

const float* RowMaker::Scales(int64_t row) const {
  isa_.from_half(weight_.scales + row * format_.groups, format_.groups, scales_.get());
  return scales_.get();
}

}  // namespace onnxcomp::sparse
