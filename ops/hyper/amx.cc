// Products of many rows with int8 activations on tile units (AMX).
//
// One group of two panels is decoded with AVX-512 into the first-level cache, a dword of four
// weights for each of 16 lanes, which is the order that the units want of their second operand. Two
// tiles of 16 rows of activations are multiplied by it at a time: four sums, so that each has three
// others to wait behind. Rows lie one after another, not interleaved.

#include "hyper/amx.h"

#include <cstring>

#include "common/amx.h"
#include "hyper/avx512.h"
#include "hyper/avx512_block.h"

namespace onnxcomp::hyper {
namespace {

constexpr int kRows = amx::kTileRows;
constexpr int kSums = kRows * kLanes;  // of a tile
static_assert(kManyRows >= kRows);

// Registers: sums of row tile i and panel p at 2 i + p, activations at 4 + i, weights at 6 + p.
constexpr int kActivations = 4;
constexpr int kWeights = 6;

void PlaceRows(const int8_t* codes, int count, int group, const Layout&, int8_t* out) {
  std::memcpy(out, codes, static_cast<size_t>(count) * static_cast<size_t>(group));
}

amx::Shapes ShapesOf(int group) {
  const int step = group < amx::kTileBytes ? group : amx::kTileBytes;
  amx::Shapes shapes;
  for (int tile = 0; tile < kActivations; ++tile) shapes.Set(tile, kRows, kLine);
  for (int i = 0; i < 2; ++i) {
    shapes.Set(kActivations + i, kRows, step);
    shapes.Set(kWeights + i, step / 4, kLine);
  }
  return shapes;
}

// Sums over one group for NT tiles of rows from x on, and both panels of w:
// sums[(2 * tile + panel) * 256 + row * 16 + lane].
template <int NT>
void SumGroup(const uint8_t* w, int group, const int8_t* x, int32_t* sums) {
  amx::Zero<0>();
  amx::Zero<1>();
  if constexpr (NT == 2) {
    amx::Zero<2>();
    amx::Zero<3>();
  }
  for (int t = 0; t < group; t += amx::kTileBytes) {
    const uint8_t* step = w + t / 4 * 2 * kLine;
    amx::Load<kWeights>(step, 2 * kLine);
    amx::Load<kActivations>(x + t, group);
    amx::Dot<0, kActivations, kWeights>();
    amx::Load<kWeights + 1>(step + kLine, 2 * kLine);
    amx::Dot<1, kActivations, kWeights + 1>();
    if constexpr (NT == 2) {
      amx::Load<kActivations + 1>(x + kRows * group + t, group);
      amx::Dot<2, kActivations + 1, kWeights>();
      amx::Dot<3, kActivations + 1, kWeights + 1>();
    }
  }
  amx::Store<0>(sums, kLine);
  amx::Store<1>(sums + kSums, kLine);
  if constexpr (NT == 2) {
    amx::Store<2>(sums + 2 * kSums, kLine);
    amx::Store<3>(sums + 3 * kSums, kLine);
  }
}

// Adds the sums of rows [skip, 16) of one tile. `biases` and `x_scales` are those of row 0, `out` is
// that of row `skip`.
void AddTile(const int32_t* sums, int panels, int skip, const int32_t* biases,
             const float* x_scales, const __m512* scales, __mmask16 sofar, float* out) {
  for (int i = skip; i < kRows; ++i) {
    const __m512i bias = _mm512_set1_epi32(biases[i]);
    for (int p = 0; p < panels; ++p) {
      const __m512i sum = _mm512_load_si512(sums + p * kSums + i * kLanes);
      float* y = out + (i - skip) * 2 * kLanes + p * kLanes;
      const __m512 before = _mm512_maskz_loadu_ps(sofar, y);
      _mm512_storeu_ps(y, Accumulate(before, _mm512_add_epi32(sum, bias), scales[p], x_scales[i]));
    }
  }
}

// One group of the rows [first, first + rows). The last tile may begin with rows that were added
// already, of this call or before it: it is as large as the others.
void MultiplyRows(const uint8_t* w, const Activations& x, int64_t g, int panels, int64_t first,
                  int64_t rows, const __m512* scales, float* out) {
  const __mmask16 sofar = g == 0 ? 0 : 0xffff;  // `out` starts from zero
  alignas(64) int32_t sums[4 * kSums];
  for (int64_t m = 0; m < rows;) {
    const int tiles = rows - m >= 2 * kRows ? 2 : 1;
    const int skip = rows - m < kRows ? static_cast<int>(kRows - (rows - m)) : 0;
    const int64_t unit = g * x.rows + first + m - skip;
    const int8_t* codes = x.codes + unit * x.group;
    if (tiles == 2) {
      SumGroup<2>(w, x.group, codes, sums);
    } else {
      SumGroup<1>(w, x.group, codes, sums);
    }
    for (int i = 0; i < tiles; ++i) {
      const int64_t at = unit + i * kRows;
      AddTile(sums + i * 2 * kSums, panels, skip, x.biases + at, x.scales + at, scales, sofar,
              out + (m + i * kRows) * 2 * kLanes);
    }
    m += tiles * kRows - skip;
  }
}

void ProductInt8(const Weight& weight, const Activations& x, int64_t panel, int panels,
                 int64_t first, int64_t rows, float* out) {
  const Format& format = weight.format;
  const Entries entries(weight, true);
  alignas(64) uint8_t w[kMaxGroup * 2 * kLanes] = {};  // a panel that is missing counts as zeros
  amx::Configure(ShapesOf(format.group));
  for (int64_t g = 0; g < format.groups; ++g) {
    Dispatch<DecodeTile>(format, weight, entries, panel, panels, g, w);
    __m512 scales[2];
    for (int p = 0; p < panels; ++p) scales[p] = LoadScales(weight.scale(panel + p, g));
    MultiplyRows(w, x, g, panels, first, rows, scales, out);
  }
  amx::Release();
}

// Only the members that int8 products of many rows use differ.
const Isa& ManyRowsIsa() {
  static const Isa isa = [] {
    Isa many = Avx512Isa();
    many.name = "amx";
    many.place = PlaceRows;
    many.product_int8 = ProductInt8;
    return many;
  }();
  return isa;
}

}  // namespace

const Isa& AmxIsa() {
  static const Isa isa = [] {
    Isa form = Avx512Isa();
    form.name = "amx";
    form.many_rows = &ManyRowsIsa();
    return form;
  }();
  return isa;
}

}  // namespace onnxcomp::hyper
