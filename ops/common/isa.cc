// Which instruction set runs: the best of this machine unless ONNXCOMP_ISA names another.

#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>

#include "common/error.h"
#ifdef ONNXCOMP_X86
#include <cpuid.h>
#endif
#ifdef ONNXCOMP_ARM64
#include <sys/auxv.h>
#endif

namespace onnxcomp {
namespace {

#ifdef ONNXCOMP_X86
// Leaf 1, ECX bit 29; the operating system's part of it is that of AVX.
bool HasF16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}

bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c();
}

// AVX-VNNI has no name in older compilers: leaf 7, sub-leaf 1, EAX bit 4.
bool HasAvxVnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}
#endif

#ifdef ONNXCOMP_ARM64
bool HasDotProduct() {
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
}
#endif

// The instruction set of this name, where the machine can run it.
std::optional<InstructionSet> Named(const char* name) {
  if (std::strcmp(name, "plain") == 0) return InstructionSet::kPlain;
#ifdef ONNXCOMP_X86
  if (std::strcmp(name, "avx512") == 0 && HasAvx512()) return InstructionSet::kAvx512;
  if (!HasAvx2()) return std::nullopt;
  if (std::strcmp(name, "avx2") == 0) return InstructionSet::kAvx2;
  if (std::strcmp(name, "avx2vnni") == 0) {
    if (HasAvxVnni()) return InstructionSet::kAvx2Vnni;
    const bool wide = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (wide) return InstructionSet::kAvx2VnniVl;
  }
#endif
#ifdef ONNXCOMP_ARM64
  if (std::strcmp(name, "neon") == 0) return InstructionSet::kNeon;
  if (std::strcmp(name, "neondot") == 0 && HasDotProduct()) return InstructionSet::kNeonDot;
#endif
  return std::nullopt;
}

}  // namespace

InstructionSet SelectInstructionSet() {
  const char* wanted = std::getenv("ONNXCOMP_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    const std::optional<InstructionSet> found = Named(wanted);
    if (found) return *found;
    Fail("ONNXCOMP_ISA is '", wanted,
         "', must be plain, avx2, avx2vnni, avx512, neon or neondot, and one that this machine can run");
  }
  for (const char* name : {"avx512", "avx2vnni", "avx2", "neondot", "neon"}) {
    const std::optional<InstructionSet> found = Named(name);
    if (found) return *found;
  }
  return InstructionSet::kPlain;
}

}  // namespace onnxcomp
