// Products of one dense row of codes with rows of activations. Included at the end of the file of each
// instruction set, which defines before it, in an unnamed namespace of onnxcomp::sparse:
//
//   Line     sixteen float32: Zero, Load, Store, LoadCodes, Broadcast, Add, Multiply, MultiplyAdd, Sum
//   Sums     sixteen int32: Nothing, Dot, ToLine
//   Word     64 codes: LoadWord
//   kBiased  whether activations count 128 more than they are (Isa::flip); then Bias says what that
//            comes to, and Minus takes it off

namespace onnxcomp::sparse {
namespace {

// Rows of activations that share what is read of the weight.
constexpr int kTile = 4;

template <int count>
void TileInt8(const Row& row, const Activations& x, int64_t first, float* y) {
  const int64_t padded = x.groups * x.group;
  const int8_t* codes[count];
  Line total[count];
  for (int m = 0; m < count; ++m) {
    codes[m] = x.codes + (first + m) * padded;
    total[m] = Zero();
  }
  alignas(64) float factors[count][kLanes];
  for (int64_t g = 0; g < x.groups; ++g) {
    const int64_t at = g % kLanes;
    if (at == 0) {  // of sixteen groups
      const Line own = Load(row.scales + g);
      for (int m = 0; m < count; ++m) {
        Store(Multiply(own, Load(x.scales + (first + m) * x.groups + g)), factors[m]);
      }
    }
    Sums sums[count];
    Sums bias = Nothing();
    for (int m = 0; m < count; ++m) sums[m] = Nothing();
    for (int64_t t = g * x.group; t < (g + 1) * x.group; t += kWord) {
      const Word word = LoadWord(row.codes + t);
      if (kBiased) bias = Bias(bias, word);
      for (int m = 0; m < count; ++m) sums[m] = Dot(sums[m], word, codes[m] + t);
    }
    for (int m = 0; m < count; ++m) {
      const Sums sum = kBiased ? Minus(sums[m], bias) : sums[m];
      total[m] = Add(total[m], Multiply(ToLine(sum), Broadcast(factors[m][at])));
    }
  }
  for (int m = 0; m < count; ++m) y[first + m] = Sum(total[m]);
}

template <int count>
void TileExact(const Row& row, const Activations& x, int64_t first, float* y) {
  const int64_t padded = x.groups * x.group;
  const float* values[count];
  Line total[count];
  for (int m = 0; m < count; ++m) {
    values[m] = x.values + (first + m) * padded;
    total[m] = Zero();
  }
  for (int64_t g = 0; g < x.groups; ++g) {
    Line sums[count];
    for (int m = 0; m < count; ++m) sums[m] = Zero();
    for (int64_t t = g * x.group; t < (g + 1) * x.group; t += kLanes) {
      const Line codes = LoadCodes(row.codes + t);
      for (int m = 0; m < count; ++m) sums[m] = MultiplyAdd(codes, Load(values[m] + t), sums[m]);
    }
    const Line scale = Broadcast(row.scales[g]);
    for (int m = 0; m < count; ++m) total[m] = MultiplyAdd(sums[m], scale, total[m]);
  }
  for (int m = 0; m < count; ++m) y[first + m] = Sum(total[m]);
}

void ProductInt8(const Row& row, const Activations& x, int64_t count, float* y) {
  int64_t first = 0;
  for (; first + kTile <= count; first += kTile) TileInt8<kTile>(row, x, first, y);
  for (; first < count; ++first) TileInt8<1>(row, x, first, y);
}

void ProductExact(const Row& row, const Activations& x, int64_t count, float* y) {
  int64_t first = 0;
  for (; first + kTile <= count; first += kTile) TileExact<kTile>(row, x, first, y);
  for (; first < count; ++first) TileExact<1>(row, x, first, y);
}

}  // namespace
}  // namespace onnxcomp::sparse
