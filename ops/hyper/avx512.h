// The AVX-512 (F, BW, DQ, VL, VBMI, VNNI) form, spread over several translation units.
#pragma once

#include "hyper/format.h"

namespace onnxcomp::hyper {

void ProductInt8Avx512(const Weight& weight, const Activations& x, int64_t panel, int panels,
                       int64_t first, int64_t rows, float* out);
void ProductExactAvx512(const Weight& weight, const Activations& x, int64_t panel, int panels,
                        int64_t first, int64_t rows, float* out);
void DecodePanelAvx512(const Weight& weight, int64_t panel, int64_t group, int count, int width,
                       float* out, int64_t stride);
void DecodeRowAvx512(const Weight& weight, int64_t row, int64_t group, int width, float* out);

const Isa& Avx512Isa();

}  // namespace onnxcomp::hyper
