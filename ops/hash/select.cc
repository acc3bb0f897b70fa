// Which instruction set runs: the choice of the hyperfunction operators.

#include <cstring>

#include "hash/format.h"
#include "hyper/format.h"

namespace onnxcomp::hash {

const Isa& SelectIsa() {
#ifdef ONNXCOMP_X86
  const char* name = hyper::SelectIsa().name;
  if (std::strcmp(name, "avx512") == 0) return Avx512Isa();
  if (std::strncmp(name, "avx2", 4) == 0) return Avx2Isa();
#endif
  return PlainIsa();
}

}  // namespace onnxcomp::hash
