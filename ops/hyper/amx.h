// The form for processors with tile units: AVX-512, and products of many rows on the tiles.
#pragma once

#include "hyper/format.h"

namespace onnxcomp::hyper {

const Isa& AmxIsa();

}  // namespace onnxcomp::hyper
