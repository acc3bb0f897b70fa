// The session's own threads.
#pragma once

#include <atomic>

#include "common/error.h"

namespace onnxcomp {

// Calls `body(i)` for i in [0, total), on the threads of the session. The body must not throw.
template <class Body>
void ParallelFor(const Api& api, const OrtKernelContext* context, size_t total, const Body& body) {
  if (total <= 1) {
    if (total == 1) body(0);
    return;
  }
  auto call = [](void* user, size_t i) { (*static_cast<const Body*>(user))(i); };
  void* user = const_cast<void*>(static_cast<const void*>(&body));
  Check(api, api.ParallelFor(context, call, total, 0, user));
}

}  // namespace onnxcomp
