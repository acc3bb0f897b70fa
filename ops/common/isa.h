// The instruction set that kernels run on, chosen once for all families of operators.
#pragma once

namespace onnxcomp {

enum class InstructionSet {
  kPlain,
  kAvx2,
  kAvx2Vnni,    // AVX2 with AVX-VNNI
  kAvx2VnniVl,  // AVX2 with the same instructions in their AVX-512 form
  kAvx512,
  kAmx,         // AVX-512 with the tile units, where they are asked for
  kNeon,
  kNeonDot,
};

// The best of this machine, or the one named by the environment variable ONNXCOMP_ISA, which has
// to be one that the machine can run. Tile units have to be named: no machine has timed them yet.
InstructionSet SelectInstructionSet();

}  // namespace onnxcomp
