// The processor that is compiled for, and what an x86 can run, asked of the processor itself: the
// compilers' own question, __builtin_cpu_supports, has no answer where their runtime library is not
// linked (clang-cl, zig).
#pragma once

#if defined(__aarch64__) || defined(_M_ARM64)
#define ONNXCOMP_ARM64 1
#elif defined(__x86_64__) || defined(_M_X64)
#define ONNXCOMP_X86 1

#include <cpuid.h>

#include <cstdint>
#include <initializer_list>

namespace onnxcomp {

// Instruction sets, in the order of the bits that `X86Bits` returns.
enum class X86 {
  kFma,
  kF16c,
  kAvx2,
  kAvx512F,
  kAvx512Dq,
  kAvx512Bw,
  kAvx512Vl,
  kAvx512Vbmi,
  kAvx512Vnni,
  kAvxVnni,
  kAvx512Vbmi2,
  kAmxTile,
  kAmxInt8,
};

// Bits of `X86` that processor and operating system both support. Source: Intel's Software
// Developer's Manual, volume 2, CPUID, and volume 1, 13.3 for the state that XGETBV reports.
inline uint32_t X86Bits() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & (1u << 27)) == 0) return 0;  // OSXSAVE
  uint32_t state = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
  constexpr uint32_t kYmm = 0x06, kZmm = 0xE6, kTileState = 0x60000;
  if ((state & kYmm) != kYmm) return 0;
  uint32_t found = 0;
  const auto add = [&found](X86 set, uint32_t bit) {
    found |= (bit & 1u) << static_cast<unsigned>(set);
  };
  add(X86::kFma, c >> 12);
  add(X86::kF16c, c >> 29);
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return found;
  const uint32_t leaves = a;
  add(X86::kAvx2, b >> 5);
  if ((state & kZmm) == kZmm) {
    add(X86::kAvx512F, b >> 16);
    add(X86::kAvx512Dq, b >> 17);
    add(X86::kAvx512Bw, b >> 30);
    add(X86::kAvx512Vl, b >> 31);
    add(X86::kAvx512Vbmi, c >> 1);
    add(X86::kAvx512Vnni, c >> 11);
    add(X86::kAvx512Vbmi2, c >> 6);
  }
  if ((state & kTileState) == kTileState) {
    add(X86::kAmxTile, d >> 24);
    add(X86::kAmxInt8, d >> 25);
  }
  if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) add(X86::kAvxVnni, a >> 4);
  return found;
}

// Whether this machine can run all of them.
inline bool HasX86(std::initializer_list<X86> sets) {
  static const uint32_t found = X86Bits();
  for (const X86 set : sets)
    if ((found >> static_cast<unsigned>(set) & 1u) == 0) return false;
  return true;
}

}  // namespace onnxcomp
#endif
