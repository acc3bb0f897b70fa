// The kernels of the instruction set that runs.

#include "common/isa.h"
#include "common/processor.h"
#include "hyper/format.h"
#ifdef ONNXCOMP_X86
#include "hyper/amx.h"
#include "hyper/avx2.h"
#include "hyper/avx512.h"
#endif
#ifdef ONNXCOMP_ARM64
#include "hyper/neon.h"
#endif

namespace onnxcomp::hyper {

const Isa& SelectIsa() {
  switch (SelectInstructionSet()) {
#ifdef ONNXCOMP_X86
#ifdef ONNXCOMP_AMX
    case InstructionSet::kAmx:
      return AmxIsa();
#endif
    case InstructionSet::kAvx512:
      return Avx512Isa();
    case InstructionSet::kAvx2Vnni:
      return Avx2VnniIsa();
    case InstructionSet::kAvx2VnniVl:
      return Avx2VnniVlIsa();
    case InstructionSet::kAvx2:
      return Avx2Isa();
#endif
#ifdef ONNXCOMP_ARM64
    case InstructionSet::kNeonDot:
      return NeonDotIsa();
    case InstructionSet::kNeon:
      return NeonIsa();
#endif
    default:
      return PlainIsa();
  }
}

}  // namespace onnxcomp::hyper
