// The AVX2 forms: one source, compiled once for each way to multiply bytes.
#pragma once

#include "hyper/format.h"

namespace onnxcomp::hyper {

const Isa& Avx2Isa();        // vpmaddubsw
const Isa& Avx2VnniIsa();    // vpdpbusd of AVX-VNNI
const Isa& Avx2VnniVlIsa();  // vpdpbusd of AVX-512 VNNI and VL, 256 bits wide

}  // namespace onnxcomp::hyper
