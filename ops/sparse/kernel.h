// SparseDecode; spec.md defines it.
#pragma once

#include <deque>

#include "common/custom_op.h"

namespace onnxcomp::sparse {

// Adds one operator for each element type.
void AddOps(const Api& api, std::deque<CustomOp>& ops);

}  // namespace onnxcomp::sparse
