// Rotation and rounding of activations, and decoding to float32, AVX-512.

#include "hyper/avx512.h"

#include "hyper/avx512_decode.h"
#include "hyper/f16c.h"
#include "hyper/plain.h"

namespace onnxcomp::hyper {
namespace {

// One butterfly inside a register: `other` is x with the partners swapped. Fused multiply-add with
// 1 and -1 rounds as the sum and the difference do.
inline __m512 Butterfly(__m512 x, __m512 other, __mmask16 upper) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_fmadd_ps(x, _mm512_mask_sub_ps(one, upper, _mm512_setzero_ps(), one), other);
}

// Strides 1, 2, 4, 8 inside one register.
inline __m512 TransformSixteen(__m512 x) {
  x = Butterfly(x, _mm512_permute_ps(x, 0xb1), 0xaaaa);
  x = Butterfly(x, _mm512_permute_ps(x, 0x4e), 0xcccc);
  x = Butterfly(x, _mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);
  return Butterfly(x, _mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
}

// The signs of 16 weights whose first is a multiple of 16: a set bit is -1.
inline __mmask16 NegativeOf(int t) {
  constexpr uint32_t kNegative = 0x7888u;
  const bool flip = ((kNegative >> (t / 16)) & 1u) != 0;
  return static_cast<__mmask16>(flip ? ~kNegative : kNegative);
}

template <int N>
void RotateGroup(const float* from, float* to) {
  const __m512 minus = _mm512_set1_ps(-0.0f);
  __m512 x[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    const __m512 value = _mm512_loadu_ps(from + 16 * i);
    x[i] = TransformSixteen(_mm512_mask_xor_ps(value, NegativeOf(16 * i), value, minus));
  }
#pragma GCC unroll 4
  for (int stride = 1; stride < N; stride *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if ((i & stride) != 0) continue;
      const __m512 a = x[i];
      const __m512 b = x[i + stride];
      x[i] = _mm512_add_ps(a, b);
      x[i + stride] = _mm512_sub_ps(a, b);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) _mm512_storeu_ps(to + 16 * i, x[i]);
}

void Rotate(const float* from, float* to, int group) {
  switch (group) {
    case 32: return RotateGroup<2>(from, to);
    case 64: return RotateGroup<4>(from, to);
    case 128: return RotateGroup<8>(from, to);
    default: return RotateGroup<16>(from, to);
  }
}

float Quantize(const float* values, int group, int8_t* codes, int32_t* total) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 finite = 0xffff;
  const __m512 largest = _mm512_set1_ps(0x1.fffffep127f);
  for (int t = 0; t < group; t += 16) {
    const __m512 magnitude = _mm512_abs_ps(_mm512_loadu_ps(values + t));
    finite = _mm512_mask_cmp_ps_mask(finite, magnitude, largest, _CMP_LE_OQ);
    most = _mm512_max_ps(most, magnitude);
  }
  const float amax = _mm512_reduce_max_ps(most);
  if (finite != 0xffff || amax < 0x1p-100f) return QuantizeGroup(values, group, codes, total);
  const __m512 inverse = _mm512_set1_ps(127.0f / amax);
  __m512i sum = _mm512_setzero_si512();
  for (int t = 0; t < group; t += 16) {
    const __m512i rounded =
        _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + t), inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + t), _mm512_cvtepi32_epi8(rounded));
    sum = _mm512_add_epi32(sum, rounded);
  }
  *total = _mm512_reduce_add_epi32(sum);
  return amax / 127.0f;
}

// A constant number of rows lets the compiler unroll.
void PlaceTiles(const int8_t* codes, int count, int group, const Layout& layout, int8_t* out) {
  constexpr int kRows = kMaxTile;
  if (count != kRows) return PlaceCodes(codes, count, group, layout, out);
  for (int t = 0; t < group; t += 4, out += 4 * kRows) {
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) std::memcpy(out + 4 * i, codes + i * group + t, 4);
  }
}

// 64 weights of one row are eight units in one register: each unit's two dwords go to its qword.
struct RowCut {
  uint32_t dwords[16];  // source dword of every dword, counted from the one before the first
  uint8_t offsets[64];
};

template <int K, int Width, int Back, bool Second>
constexpr RowCut RowCutOf() {
  RowCut result{};
  for (int u = 0; u < 8; ++u) {
    const Cut cut = CutOf(K, u % 4, Width, Back);
    const bool second = Second && cut.next >= 0;
    const int pair = (second ? cut.next : cut.pair) + u / 4 * K;
    result.dwords[2 * u] = static_cast<uint32_t>(pair);
    result.dwords[2 * u + 1] = static_cast<uint32_t>(pair + 1);
    for (int w = 0; w < 8; ++w) {
      result.offsets[8 * u + w] = static_cast<uint8_t>((second ? cut.high : cut.low) >> (8 * w));
    }
  }
  return result;
}

template <int K, int Width, int Back>
constexpr uint64_t SecondMask() {
  uint64_t mask = 0;
  for (int u = 0; u < 8; ++u) {
    mask |= static_cast<uint64_t>(CutOf(K, u % 4, Width, Back).chosen) << (8 * u);
  }
  return mask;
}

template <int K, int Width, int Back>
inline __m512i CutRow(__m512i dwords) {
  static constexpr RowCut kFirst = RowCutOf<K, Width, Back, false>();
  static constexpr RowCut kSecond = RowCutOf<K, Width, Back, true>();
  constexpr uint64_t kMask = SecondMask<K, Width, Back>();
  const __m512i pairs = _mm512_permutexvar_epi32(_mm512_loadu_si512(kFirst.dwords), dwords);
  const __m512i windows =
      _mm512_multishift_epi64_epi8(_mm512_loadu_si512(kFirst.offsets), pairs);
  if constexpr (kMask == 0) {
    return windows;
  } else {
    const __m512i others = _mm512_permutexvar_epi32(_mm512_loadu_si512(kSecond.dwords), dwords);
    return _mm512_mask_multishift_epi64_epi8(windows, kMask, _mm512_loadu_si512(kSecond.offsets),
                                             others);
  }
}

// q[0..group) of one row, as bytes; writes up to the next multiple of 64.
template <int K, int L>
struct DecodeRow {
  static void Run(const Weight& weight, const uint8_t* lane, int8_t* q) {
    const LookupOf<L, false> lookup(weight.table);
    const int count = weight.format.dwords;
    uint32_t dwords[kMaxGroup * 6 / 32 + 32] = {};
    dwords[0] = DwordOf(lane, count - 1);
    for (int d = 0; d < count; ++d) dwords[d + 1] = DwordOf(lane, d);
    for (int t = 0; t < weight.format.group; t += 64) {
      const __m512i source = _mm512_loadu_si512(dwords + t / 32 * K);
      constexpr int kWidth = L <= 8 ? L : 8;
      const __m512i low = CutRow<K, kWidth, L - kWidth>(source);
      const __m512i high = L <= 8 ? low : CutRow<K, 8, 0>(source);
      _mm512_storeu_si512(q + t, lookup.Find(low, high));
    }
  }
};

inline __m512i Butterfly16(__m512i x, __m512i other, __mmask32 upper) {
  return _mm512_mask_sub_epi16(_mm512_add_epi16(x, other), upper, other, x);
}

// Strides 1 .. 16 inside one register of 32 integers.
inline __m512i TransformThirtyTwo(__m512i x) {
  x = Butterfly16(x, _mm512_rol_epi32(x, 16), 0xaaaaaaaau);
  x = Butterfly16(x, _mm512_shuffle_epi32(x, _MM_PERM_CDAB), 0xccccccccu);
  x = Butterfly16(x, _mm512_shuffle_epi32(x, _MM_PERM_BADC), 0xf0f0f0f0u);
  x = Butterfly16(x, _mm512_shuffle_i32x4(x, x, 0xb1), 0xff00ff00u);
  return Butterfly16(x, _mm512_shuffle_i32x4(x, x, 0x4e), 0xffff0000u);
}

// sign * H q of one row, in place in int16.
void TransformRow(const int8_t* q, int group, __m512i* h) {
  const int n = group / 32;
  for (int i = 0; i < n; ++i) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32 * i));
    h[i] = TransformThirtyTwo(_mm512_cvtepi8_epi16(bytes));
  }
  for (int stride = 1; stride < n; stride *= 2) {
    for (int i = 0; i < n; ++i) {
      if ((i & stride) != 0) continue;
      const __m512i a = h[i];
      const __m512i b = h[i + stride];
      h[i] = _mm512_add_epi16(a, b);
      h[i + stride] = _mm512_sub_epi16(a, b);
    }
  }
  for (int i = 0; i < n; ++i) {
    const uint32_t upper = NegativeOf(32 * i + 16);
    const __mmask32 negative = NegativeOf(32 * i) | (upper << 16);
    h[i] = _mm512_mask_sub_epi16(h[i], negative, _mm512_setzero_si512(), h[i]);
  }
}

void DecodeLane512(const Weight& weight, const uint8_t* lane, uint16_t scale, int width,
                   float* out) {
  alignas(64) int8_t q[kMaxGroup];
  __m512i h[kMaxGroup / 32];
  Dispatch<DecodeRow>(weight.format, weight, lane, q);
  TransformRow(q, weight.format.group, h);
  const __m512 factor = _mm512_set1_ps(ScaleOf(scale));
  for (int t = 0; t < width; t += 16) {
    const __m512i wide = h[t / 32];
    const __m256i part = t % 32 == 0 ? _mm512_castsi512_si256(wide)
                                     : _mm512_extracti64x4_epi64(wide, 1);
    const __m512 values =
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(part)), factor);
    const int left = width - t;
    const auto kept = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    _mm512_mask_storeu_ps(out + t, kept, values);
  }
}

}  // namespace

void DecodePanelAvx512(const Weight& weight, int64_t panel, int64_t group, int count, int width,
                       float* out, int64_t stride) {
  const uint8_t* block = weight.block(panel, group);
  const uint16_t* scales = weight.scale(panel, group);
  for (int lane = 0; lane < count; ++lane) {
    DecodeLane512(weight, block + lane * 4, scales[lane], width, out + lane * stride);
  }
}

void DecodeRowAvx512(const Weight& weight, int64_t row, int64_t group, int width, float* out) {
  const int64_t panel = row / kLanes;
  const auto lane = static_cast<int>(row % kLanes);
  DecodeLane512(weight, weight.block(panel, group) + lane * 4, weight.scale(panel, group)[lane],
                width, out);
}

const Isa& Avx512Isa() {
  static const Isa isa{
      "avx512",
      kMaxTile,
      IdentityPosition,
      UnsignedBias,
      Rotate,
      FromHalfF16c,
      ToHalfF16c,
      Quantize,
      PlaceTiles,
      ProductInt8Avx512,
      ProductExactAvx512,
      DecodePanelAvx512,
      DecodeRowAvx512};
  return isa;
}

}  // namespace onnxcomp::hyper
