// Which instruction set runs: the best of this machine unless ONNXCOMP_ISA names another.

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "hyper/format.h"
#ifdef ONNXCOMP_X86
#include "hyper/avx512.h"
#endif

namespace onnxcomp::hyper {
namespace {

#ifdef ONNXCOMP_X86
bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
#endif

// The form of this name, or null where the machine cannot run it.
const Isa* Named(const char* name) {
  if (std::strcmp(name, "plain") == 0) return &PlainIsa();
#ifdef ONNXCOMP_X86
  if (std::strcmp(name, "avx512") == 0 && HasAvx512()) return &Avx512Isa();
#endif
  return nullptr;
}

}  // namespace

const Isa& SelectIsa() {
  const char* wanted = std::getenv("ONNXCOMP_ISA");
  if (wanted != nullptr) {
    const Isa* isa = Named(wanted);
    if (isa != nullptr) return *isa;
  }
  for (const char* name : {"avx512", "avx2vnni", "avx2"}) {
    const Isa* isa = Named(name);
    if (isa != nullptr) return *isa;
  }
  return PlainIsa();
}

}  // namespace onnxcomp::hyper
