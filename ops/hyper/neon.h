// The NEON forms: one source, compiled once for each way to multiply bytes.
#pragma once

#include "hyper/format.h"

namespace onnxcomp::hyper {

const Isa& NeonIsa();     // what every 64-bit ARM has
const Isa& NeonDotIsa();  // with the dot product of ARMv8.2

}  // namespace onnxcomp::hyper
