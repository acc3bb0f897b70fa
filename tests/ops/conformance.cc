// Compares every instruction set of this machine with plain C++, without a runtime: decoding,
// rotation, rounding and int8 products bit by bit, exact products within float32 rounding.
//
//   conformance [NAME ...]     the names ONNXCOMP_ISA takes; all that this machine can run
//
// Prints one line for each set, with the number of cases; exits 1 at the first difference.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/error.h"
#include "conformance_sparse.h"
#include "hyper/format.h"

using namespace onnxcomp::hyper;

namespace {

// What a table is like; forms of kernels depend on it.
enum Kind { kAny, kOdd, kLeveled, kFalling, kSloped, kTwisted, kTurned, kKinds };
constexpr const char* kNames[] = {"any", "odd", "leveled", "falling", "sloped", "twisted", "turned"};

struct Case {
  int bits, states, group;
  int64_t rows, length;
  Kind kind;
};

[[noreturn]] void Differs(const Isa& isa, const Case& c, const char* what, int64_t m) {
  std::printf("%s: %s differs at k=%d L=%d g=%d, weight %lldx%lld, %s table, m=%lld\n", isa.name,
              what, c.bits, c.states, c.group, static_cast<long long>(c.rows),
              static_cast<long long>(c.length), kNames[c.kind], static_cast<long long>(m));
  std::exit(1);
}

// Random codes, scales and table, owned.
struct Payload {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales;
  std::vector<int8_t> table;
  Levels levels{};
  Structure structure{};
  Weight weight{};

  Payload(const Case& c, std::mt19937& random) {
    Format f{};
    f.rows = c.rows;
    f.length = c.length;
    f.panels = (c.rows + kLanes - 1) / kLanes;
    f.groups = (c.length + c.group - 1) / c.group;
    f.group = c.group;
    f.bits = c.bits;
    f.states = c.states;
    f.dwords = c.bits * c.group / 32;
    codes.resize(static_cast<size_t>(f.panels * f.groups * f.dwords * kLine));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random());
    scales.resize(static_cast<size_t>(f.panels * f.groups * kLanes));
    // Halves from 2^-3 to 2^1, either sign.
    for (uint16_t& scale : scales) {
      scale = static_cast<uint16_t>((random() & 0x8fffu) + 0x3000u);
    }
    table.resize(size_t{1} << c.states);
    for (int8_t& entry : table) entry = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    if (c.kind == kLeveled) Level(c.states, static_cast<uint32_t>(random() % table.size()) | 1u);
    if (c.kind == kOdd) {
      for (size_t s = 0; s < table.size() / 2; ++s) {
        table[table.size() - 1 - s] = static_cast<int8_t>(-table[s]);
      }
    }
    if (c.kind >= kFalling) Build(c, random);
    const bool leveled = levels.Find(table.data(), c.states);
    const bool structured = structure.Find(table.data(), c.states, c.bits);
    weight = Weight{f,
                    codes.data(),
                    scales.data(),
                    table.data(),
                    leveled ? &levels : nullptr,
                    structured ? &structure : nullptr};
    if (leveled != (c.kind == kLeveled)) Differs(PlainIsa(), c, "Levels::Find", 0);
    const bool found = c.kind == kFalling || (c.kind > kFalling && c.states <= 8);
    if (structured != found) Differs(PlainIsa(), c, "Structure::Find", 0);
    if (structured && structure.kind != KindOf(c)) Differs(PlainIsa(), c, "Structure::kind", 0);
  }

  // What is found: with six or seven state bits, G of a falling table falls in several classes, and
  // twists are not looked for with six.
  static Structure::Kind KindOf(const Case& c) {
    switch (c.kind) {
      case kFalling: return c.states >= 8 ? Structure::kFalling : Structure::kSloped;
      case kSloped: return Structure::kSloped;
      case kTwisted: return c.states > 6 ? Structure::kTwisted : Structure::kTurned;
      default: return Structure::kTurned;
    }
  }

 private:
  // F[(N + P[c]) mod 16] + G[c] times a power of two, over a range of odd middle.
  void Build(const Case& c, std::mt19937& random) {
    const bool narrow = c.group % 64 != 0;
    const int limit = narrow ? 31 : 63;
    const int shift = c.states > 8 ? 1 : static_cast<int>(random() % 3);
    int cells[16];
    int turns[16];
    int steps[16];
    for (int i = 0; i < 16; ++i) {
      cells[i] = static_cast<int>(random() % static_cast<unsigned>(limit - 14));
      turns[i] = c.kind >= kTwisted ? static_cast<int>(random() % 16) : i;
      const bool tied = c.kind == kFalling || c.kind == kTwisted;
      steps[i] = tied ? 15 - turns[i] : static_cast<int>(random() % 16);
    }
    cells[3] = limit - 15;
    cells[5] = 1;
    cells[7] = 0;
    const int middle = -(limit << shift) / 2;
    for (size_t s = 0; s < table.size(); ++s) {
      const int top = static_cast<int>(s) >> (c.states - 4);
      const int low = static_cast<int>(s) & 15;
      const int sum = cells[(top + turns[low]) % 16] + steps[low];
      table[s] = static_cast<int8_t>(sum * (1 << shift) + middle);
    }
  }

  // Neighbours on a winding share a value.
  void Level(int states, uint32_t multiplier) {
    int8_t values[256];
    for (int v = 0; v < 128; ++v) {
      values[v] = table[static_cast<size_t>(v)];
      values[255 - v] = static_cast<int8_t>(-values[v]);
    }
    uint32_t u = (multiplier - 1) / 2;
    for (int8_t& entry : table) {
      entry = values[(u & ((1u << states) - 1)) >> (states - 8)];
      u += multiplier;
    }
  }
};

// Rows of activations as one instruction set wants them; see Activations.
struct Laid {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> biases;
  std::vector<float> values;
  std::unique_ptr<bool[]> calm;
  Activations view{};

  Laid(const Isa& isa, const Weight& weight, const std::vector<float>& x, int64_t rows) {
    const Format& f = weight.format;
    const auto units = static_cast<size_t>(rows * f.groups);
    codes.resize(units * static_cast<size_t>(f.group));
    values.resize(codes.size());
    scales.resize(units);
    biases.resize(units);
    calm = std::make_unique<bool[]>(units);
    const Layout layout = LayoutOf(isa, weight);
    for (int64_t first = 0; first < rows; first += isa.tile) {
      const int64_t count = rows - first < isa.tile ? rows - first : isa.tile;
      for (int64_t g = 0; g < f.groups; ++g) {
        Place(isa, f, layout, x.data() + first * f.padded(), static_cast<int>(count), rows, first, g);
      }
    }
    view = Activations{rows,         f.groups,      f.group,       isa.tile,
                       codes.data(), scales.data(), biases.data(), values.data(), calm.get()};
  }

 private:
  // Group g of the `count` rows of one tile, which begins with row `first`.
  void Place(const Isa& isa, const Format& f, const Layout& layout, const float* x, int count,
             int64_t rows, int64_t first, int64_t g) {
    const int64_t unit = g * rows + first;
    int8_t rounded[kMaxTile * kMaxGroup];
    for (int i = 0; i < count; ++i) {
      float rotated[kMaxGroup];
      int32_t total = 0;
      isa.rotate(x + i * f.padded() + g * f.group, rotated, f.group);
      scales[static_cast<size_t>(unit + i)] =
          isa.quantize(rotated, f.group, rounded + i * f.group, &total);
      biases[static_cast<size_t>(unit + i)] = layout.bias * total;
      for (int t = 0; t < f.group; ++t) {
        values[static_cast<size_t>(unit * f.group + t * count + i)] = rotated[t];
      }
    }
    int8_t* placed = codes.data() + unit * f.group;
    isa.place(rounded, count, f.group, layout, placed);
    if (isa.calm) calm[static_cast<size_t>(unit)] = isa.calm(placed, count, f.group);
  }
};

using Call = decltype(Isa::product_int8);

// The whole product, panel pair by panel pair, rows side by side.
std::vector<float> Multiply(Call call, const Weight& weight, const Activations& x) {
  const int64_t columns = weight.format.panels * kLanes;
  std::vector<float> y(static_cast<size_t>(x.rows * columns));
  alignas(64) float out[kRowBlock * 2 * kLanes];
  for (int64_t first = 0; first < x.rows; first += kRowBlock) {
    const int64_t rows = x.rows - first < kRowBlock ? x.rows - first : kRowBlock;
    for (int64_t panel = 0; panel < weight.format.panels; panel += 2) {
      const int panels = weight.format.panels - panel < 2 ? 1 : 2;
      call(weight, x, panel, panels, first, rows, out);
      for (int64_t m = 0; m < rows; ++m) {
        std::memcpy(y.data() + (first + m) * columns + panel * kLanes, out + m * 2 * kLanes,
                    static_cast<size_t>(panels * kLanes) * sizeof(float));
      }
    }
  }
  return y;
}

std::vector<float> Decode(const Isa& isa, const Weight& weight) {
  const Format& f = weight.format;
  std::vector<float> w(static_cast<size_t>(f.panels * kLanes * f.padded()));
  for (int64_t panel = 0; panel < f.panels; ++panel) {
    for (int64_t g = 0; g < f.groups; ++g) {
      float* out = w.data() + panel * kLanes * f.padded() + g * f.group;
      isa.decode_panel(weight, panel, g, kLanes, f.group, out, f.padded());
    }
  }
  return w;
}

bool Same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void CompareRow(const Isa& isa, const Case& c, const Weight& weight, const std::vector<float>& w) {
  const Format& f = weight.format;
  for (int64_t row = 0; row < f.panels * kLanes; ++row) {
    for (int64_t g = 0; g < f.groups; ++g) {
      float out[kMaxGroup];
      isa.decode_row(weight, row, g, f.group, out);
      const float* want = w.data() + row * f.padded() + g * f.group;
      if (std::memcmp(out, want, static_cast<size_t>(f.group) * sizeof(float)) != 0) {
        Differs(isa, c, "decode_row", row);
      }
    }
  }
}

// Norms of rows times an error for each term: more than any order of sums can be off.
bool Close(const std::vector<float>& a, const std::vector<float>& b, const Format& f) {
  double square = 0.0;
  for (float value : b) square += static_cast<double>(value) * value;
  const double bound = static_cast<double>(f.group + f.groups + 16) * 0x1p-22 *
                       std::sqrt(square / static_cast<double>(b.size())) * 16;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::fabs(a[i] - b[i]) <= bound)) return false;
  }
  return true;
}

// Random rows, one of them zeros; one rotates to a single value in each group.
std::vector<float> RandomRows(const Format& f, int64_t rows, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(rows * f.padded()));
  for (float& value : x) value = normal(random);
  for (int64_t t = 0; t < f.padded(); ++t) x[static_cast<size_t>((rows / 2) * f.padded() + t)] = 0;
  if (rows > 4) {
    for (int64_t t = 0; t < f.padded(); ++t) {
      x[static_cast<size_t>((rows / 4) * f.padded() + t)] = t % f.group == 0 ? 1.0f : 0.0f;
    }
  }
  return x;
}

void CompareProducts(const Isa& isa, const Case& c, const Weight& weight, std::mt19937& random) {
  const Isa& plain = PlainIsa();
  const Format& f = weight.format;
  for (int64_t rows : {1, 2, 3, 4, 13}) {
    const std::vector<float> x = RandomRows(f, rows, random);
    const Laid here(isa, weight, x, rows);
    const Laid there(plain, weight, x, rows);
    if (!Same(Multiply(isa.product_int8, weight, here.view),
              Multiply(plain.product_int8, weight, there.view))) {
      Differs(isa, c, "product_int8", rows);
    }
    if (!Close(Multiply(isa.product_exact, weight, here.view),
               Multiply(plain.product_exact, weight, there.view), f)) {
      Differs(isa, c, "product_exact", rows);
    }
  }
}

// The form for many rows: whole blocks and tiles, and a block's last rows.
void CompareManyRows(const Isa& isa, const Case& c, const Weight& weight) {
  std::mt19937 random(8);
  for (int64_t rows : {int64_t{kManyRows}, int64_t{kManyRows} + 17, int64_t{kRowBlock} + 5}) {
    const std::vector<float> x = RandomRows(weight.format, rows, random);
    const Laid here(isa, weight, x, rows);
    const Laid there(PlainIsa(), weight, x, rows);
    if (!Same(Multiply(isa.product_int8, weight, here.view),
              Multiply(PlainIsa().product_int8, weight, there.view))) {
      Differs(isa, c, "product_int8 of many rows", rows);
    }
  }
}

void CompareHalves(const Isa& isa) {
  std::vector<uint16_t> halves;
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const bool nan = (bits & 0x7c00u) == 0x7c00u && (bits & 0x3ffu) != 0;
    if (!nan) halves.push_back(static_cast<uint16_t>(bits));
  }
  const auto count = static_cast<int64_t>(halves.size());
  std::vector<float> a(halves.size()), b(halves.size());
  isa.from_half(halves.data(), count, a.data());
  PlainIsa().from_half(halves.data(), count, b.data());
  if (!Same(a, b)) Differs(isa, {}, "from_half", 0);
  // Values between halves too, ties among them.
  for (float factor : {1.0f, 1.00048828125f, 0.9997f, 1.3f}) {
    std::vector<float> values(b);
    for (float& value : values) value *= factor;
    std::vector<uint16_t> here(halves.size()), there(halves.size());
    isa.to_half(values.data(), count, here.data());
    PlainIsa().to_half(values.data(), count, there.data());
    if (here != there) Differs(isa, {}, "to_half", 0);
  }
}

void CompareRotations(const Isa& isa, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (int group : {32, 64, 128, 256}) {
    for (float special : {0.0f, -0.0f, 1e-35f, INFINITY, NAN}) {
      float x[kMaxGroup], here[kMaxGroup], there[kMaxGroup];
      int8_t a[kMaxGroup] = {}, b[kMaxGroup] = {};
      int32_t sums[2] = {};
      for (int t = 0; t < group; ++t) x[t] = special == 1e-35f ? special : normal(random);
      x[5] = special;
      isa.rotate(x, here, group);
      PlainIsa().rotate(x, there, group);
      const float s = isa.quantize(here, group, a, &sums[0]);
      const float t = PlainIsa().quantize(there, group, b, &sums[1]);
      const bool finite = std::isfinite(special);
      const auto bytes = static_cast<size_t>(group);
      if ((finite && std::memcmp(here, there, bytes * sizeof(float)) != 0) ||
          std::memcmp(a, b, bytes) != 0 || std::memcmp(&s, &t, sizeof s) != 0 ||
          sums[0] != sums[1]) {
        Differs(isa, {0, 0, group, 0, 0, kAny}, "rotate or quantize", 0);
      }
    }
  }
}

// Isa::calm for codes of all sizes: on both sides of its bound, and for the largest codes.
void CompareCalm(const Isa& isa, std::mt19937& random) {
  if (isa.calm == nullptr) return;
  const int most = std::numeric_limits<int16_t>::max() / kMaxEntry;
  int found[2] = {};
  for (int trial = 0; trial < 4000; ++trial) {
    const int group = 32 << trial % 4;
    const int scale = 1 + trial % 127;
    const bool lean = trial % 3 == 0;
    int8_t codes[4 * kMaxGroup];
    int largest = 0;
    for (int t = 0; t < 4 * group; ++t) {
      const int code = static_cast<int>(random() % static_cast<unsigned>(2 * scale + 1)) - scale;
      codes[t] = static_cast<int8_t>(lean ? -scale : code);
    }
    for (int t = 0; t < group; t += 16) {
      for (int pair = 0; pair < 2 * isa.tile; ++pair) {
        int above = 0;
        int below = 0;
        for (int v = 0; v < 8; ++v) {
          const int code = codes[t * isa.tile + v / 2 * 4 * isa.tile + 2 * pair + v % 2];
          (code > 0 ? above : below) += std::abs(code);
        }
        largest = std::max({largest, above, below});
      }
    }
    const bool calm = isa.calm(codes, isa.tile, group);
    ++found[calm];
    if (calm != (largest <= most)) Differs(isa, {0, 0, group, 0, 0, kAny}, "calm", trial);
  }
  if (found[0] < 100 || found[1] < 100 || isa.calm(nullptr, isa.tile - 1, 32)) {
    Differs(isa, {}, "calm", 0);
  }
}

int Compare(const Isa& isa) {
  std::mt19937 random(7);
  CompareHalves(isa);
  CompareRotations(isa, random);
  CompareCalm(isa, random);
  int cases = 0;
  for (int bits = 1; bits <= 6; ++bits) {
    for (int states : {6, 7, 8, 10, 12}) {
      for (int group : {32, 64, 128, 256}) {
        if (states < bits + 2) continue;
        for (int number = kAny; number < kKinds; ++number) {
          const Kind kind = static_cast<Kind>(number);
          if (kind == kLeveled && states <= 8) continue;
          if (kind >= kFalling && !Structure::Known(states, bits)) continue;
          const Case c{bits, states, group, kind == kAny ? 45 : 20, 2 * group, kind};
          const Payload payload(c, random);
          const std::vector<float> w = Decode(isa, payload.weight);
          if (!Same(w, Decode(PlainIsa(), payload.weight))) Differs(isa, c, "decode_panel", 0);
          CompareRow(isa, c, payload.weight, w);
          CompareProducts(isa, c, payload.weight, random);
          if (isa.many_rows) CompareManyRows(*isa.many_rows, c, payload.weight);
          ++cases;
        }
      }
    }
  }
  return cases;
}

// The set of this name, or null where the machine has it not.
const Isa* Find(const std::string& name) {
#ifdef _WIN32
  _putenv_s("ONNXCOMP_ISA", name.c_str());
#else
  setenv("ONNXCOMP_ISA", name.c_str(), 1);
#endif
  try {
    return &SelectIsa();
  } catch (const onnxcomp::Error&) {
    return nullptr;
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> names(arguments + 1, arguments + count);
  const bool all = names.empty();
  if (all) names = {"plain", "avx2", "avx2vnni", "avx512", "amx", "neon", "neondot"};
  for (const std::string& name : names) {
    const Isa* isa = Find(name);
    if (isa == nullptr && !all) {
      std::printf("%s: this machine cannot run it\n", name.c_str());
      return 1;
    }
    if (isa == nullptr) continue;
    const int sparse = conformance::CompareSparse(onnxcomp::sparse::SelectIsa());
    std::printf("%s: %d cases\n", isa->name, Compare(*isa) + sparse);
  }
  return 0;
}
