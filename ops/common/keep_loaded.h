// The runtime unloads the library with its last session; statics must survive that.
#pragma once

namespace onnxcomp {

// Keeps this library in the process until it ends.
void KeepLoaded();

}  // namespace onnxcomp
