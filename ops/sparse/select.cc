// The kernels of the instruction set that runs.

#include "common/isa.h"
#include "common/processor.h"
#include "sparse/format.h"

namespace onnxcomp::sparse {

const Isa& SelectIsa() {
  switch (SelectInstructionSet()) {
#ifdef ONNXCOMP_X86
    case InstructionSet::kAmx:
    case InstructionSet::kAvx512:
      return HasX86({X86::kAvx512Vbmi2}) ? Avx512Isa() : Avx2Isa();
    case InstructionSet::kAvx2Vnni:
    case InstructionSet::kAvx2VnniVl:
    case InstructionSet::kAvx2:
      return Avx2Isa();
#endif
#ifdef ONNXCOMP_ARM64
    case InstructionSet::kNeon:
    case InstructionSet::kNeonDot:
      return NeonIsa();
#endif
    default:
      return PlainIsa();
  }
}

}  // namespace onnxcomp::sparse
