// SignDecode; spec.md defines it.
#pragma once

#include <deque>

#include "common/custom_op.h"

namespace onnxcomp::sign {

void AddOps(const Api& api, std::deque<CustomOp>& ops);

}  // namespace onnxcomp::sign
