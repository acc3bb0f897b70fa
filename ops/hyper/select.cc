// Which instruction set runs: the best of this machine unless ONNXCOMP_ISA names another.

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "common/error.h"
#include "hyper/format.h"
#ifdef ONNXCOMP_X86
#include <cpuid.h>

#include "hyper/avx2.h"
#include "hyper/avx512.h"
#endif
#ifdef ONNXCOMP_ARM64
#include <sys/auxv.h>

#include "hyper/neon.h"
#endif

namespace onnxcomp::hyper {
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

// The form of this name, or null where the machine cannot run it.
const Isa* Named(const char* name) {
  if (std::strcmp(name, "plain") == 0) return &PlainIsa();
#ifdef ONNXCOMP_X86
  if (std::strcmp(name, "avx512") == 0 && HasAvx512()) return &Avx512Isa();
  if (!HasAvx2()) return nullptr;
  if (std::strcmp(name, "avx2") == 0) return &Avx2Isa();
  if (std::strcmp(name, "avx2vnni") == 0) {
    if (HasAvxVnni()) return &Avx2VnniIsa();
    const bool wide = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    return wide ? &Avx2VnniVlIsa() : nullptr;
  }
#endif
#ifdef ONNXCOMP_ARM64
  if (std::strcmp(name, "neon") == 0) return &NeonIsa();
  if (std::strcmp(name, "neondot") == 0 && HasDotProduct()) return &NeonDotIsa();
#endif
  return nullptr;
}

}  // namespace

const Isa& SelectIsa() {
  const char* wanted = std::getenv("ONNXCOMP_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    const Isa* isa = Named(wanted);
    if (isa != nullptr) return *isa;
    Fail("ONNXCOMP_ISA is '", wanted,
         "', must be plain, avx2, avx2vnni, avx512, neon or neondot, and one that this machine can run");
  }
  for (const char* name : {"avx512", "avx2vnni", "avx2", "neondot", "neon"}) {
    const Isa* isa = Named(name);
    if (isa != nullptr) return *isa;
  }
  return PlainIsa();
}

}  // namespace onnxcomp::hyper
