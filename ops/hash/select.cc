// The kernels of the instruction set that runs.

#include "common/isa.h"
#include "common/processor.h"
#include "hash/format.h"

namespace onnxcomp::hash {

const Isa& SelectIsa() {
  switch (SelectInstructionSet()) {
#ifdef ONNXCOMP_X86
    case InstructionSet::kAmx:
    case InstructionSet::kAvx512:
      return Avx512Isa();
    case InstructionSet::kAvx2Vnni:
    case InstructionSet::kAvx2VnniVl:
    case InstructionSet::kAvx2:
      return Avx2Isa();
#endif
    default:
      return PlainIsa();
  }
}

}  // namespace onnxcomp::hash
