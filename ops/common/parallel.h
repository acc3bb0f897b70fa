// The session's own threads.
#pragma once

#include <cstddef>
#include <cstdint>

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

// Calls `body(i)` for i in [0, total), `per_task` of them in one piece of work.
template <class Body>
void ParallelPieces(const Api& api, const OrtKernelContext* context, int64_t total,
                    int64_t per_task, const Body& body) {
  const int64_t size = per_task < 1 ? 1 : per_task;
  ParallelFor(api, context, static_cast<size_t>((total + size - 1) / size), [&](size_t task) {
    const int64_t begin = static_cast<int64_t>(task) * size;
    const int64_t end = begin + size < total ? begin + size : total;
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace onnxcomp
