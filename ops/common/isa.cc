// Which instruction set runs: the best of this machine unless ONNXCOMP_ISA names another.

#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>

#include "common/amx.h"
#include "common/error.h"
#include "common/processor.h"
#if defined(ONNXCOMP_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(ONNXCOMP_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(ONNXCOMP_ARM64) && defined(_WIN32)
#include <windows.h>
#endif

namespace onnxcomp {
namespace {

#ifdef ONNXCOMP_X86
bool HasAvx512() {
  return HasX86({X86::kAvx512F, X86::kAvx512Bw, X86::kAvx512Dq, X86::kAvx512Vl,
                 X86::kAvx512Vbmi, X86::kAvx512Vnni});
}

bool HasAvx2() { return HasX86({X86::kAvx2, X86::kFma, X86::kF16c}); }
#endif

#ifdef ONNXCOMP_ARM64
bool HasDotProduct() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#elif defined(__APPLE__)
  int present = 0;
  size_t size = sizeof present;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &present, &size, nullptr, 0) == 0 &&
         present != 0;
#elif defined(_WIN32)
  constexpr DWORD kDotProduct = 43;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
  return IsProcessorFeaturePresent(kDotProduct) != 0;
#else
  return false;
#endif
}
#endif

// The instruction set of this name, where the machine can run it.
std::optional<InstructionSet> Named(const char* name) {
  if (std::strcmp(name, "plain") == 0) return InstructionSet::kPlain;
#ifdef ONNXCOMP_X86
  if (std::strcmp(name, "avx512") == 0 && HasAvx512()) return InstructionSet::kAvx512;
#ifdef ONNXCOMP_AMX
  if (std::strcmp(name, "amx") == 0 && HasAvx512() && amx::Available()) return InstructionSet::kAmx;
#endif
  if (!HasAvx2()) return std::nullopt;
  if (std::strcmp(name, "avx2") == 0) return InstructionSet::kAvx2;
  if (std::strcmp(name, "avx2vnni") == 0) {
    if (HasX86({X86::kAvxVnni})) return InstructionSet::kAvx2Vnni;
    if (HasX86({X86::kAvx512Vl, X86::kAvx512Vnni})) return InstructionSet::kAvx2VnniVl;
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
         "', must be plain, avx2, avx2vnni, avx512, amx, neon or neondot, and one that this machine can run");
  }
  for (const char* name : {"avx512", "avx2vnni", "avx2", "neondot", "neon"}) {
    const std::optional<InstructionSet> found = Named(name);
    if (found) return *found;
  }
  return InstructionSet::kPlain;
}

}  // namespace onnxcomp
