// From weights and activations to launches; and errors of the C functions.
#pragma once

#include <algorithm>
#include <exception>
#include <string>

#include "gpu/launch.h"
#include "gpu/product.h"

namespace onnxcomp::gpu {

// Rows of activations that are prepared at once, which bounds the scratch memory.
constexpr int64_t kBatchBlock = 2048;

// The text behind onnxcomp_cuda_error().
std::string& LastError();

// Runs `body`; 1 when it throws, with the text kept.
template <class Body>
int Report(const Body& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    LastError() = error.what();
    return 1;
  }
}

// Throws GpuError unless `holds`.
inline void Require(bool holds, const std::string& text) {
  if (!holds) throw GpuError(text);
}

Type ReadType(int32_t type);

// How activations are cut for a kind of weight.
struct Cut {
  int64_t length, groups;
  int group;
  bool rotated;
  Placement placement;
};

// A product, as far as the choice of kernels depends on it.
struct Task {
  Cut cut;
  int64_t rows, panels, units;
  int64_t batch;  // at most kBatchBlock
  Type type;
};

// Two parts where float32 asks for them, or where they cost nothing.
inline int PartsOf(Type type, int64_t batch) {
  return type == Type::kFloat32 || batch <= 4 ? 2 : 1;
}

// Parts of the scratch memory of one product, in bytes from its beginning.
struct Plan {
  int parts;
  int tiles;       // of 8 columns in a block; 1: SmallProduct
  int64_t room;    // for columns
  int64_t splits;  // blocks that share the units
  int64_t factors, partial, bytes;
};

// What a plan depends on of a source.
struct SourceSize {
  int64_t table_bytes;
  int steps;
  bool few_forms;  // only SmallProduct and eight tiles
};

template <class Source>
SourceSize SizeOf(const Source& source) {
  return {source.TableBytes(), Source::kRun / kPerVector, Source::kFewForms};
}

Plan PlanFor(const Task& task, const SourceSize& size, const Device& device);

// Scratch memory that a batch needs, whose blocks of rows use it in turn.
int64_t ScratchFor(Task task, int64_t batch, const SourceSize& size);

// Prepares x in the scratch memory and returns the columns.
Columns PrepareColumns(const Task& task, const Plan& plan, const void* x, char* scratch,
                       cudaStream_t stream);

template <int kTiles, class Source>
void LaunchTiled(const Task& task, const Plan& plan, const Source& source, const Columns& columns,
                 const Output& y, char* scratch, cudaStream_t stream) {
  auto* partial = reinterpret_cast<float*>(scratch + plan.partial);
  Output out = y;
  if (plan.splits > 1) out = {Type::kFloat32, partial, y.batch, y.rows, 1.0f};
  const TiledProduct<Source, kTiles> kernel{source, columns, out, plan.splits};
  const Grid grid{DivideUp(task.panels, kWarps), DivideUp(columns.count, 8 * kTiles), plan.splits};
  Launch(stream, grid, kernel.SharedBytes(), kernel);
  if (plan.splits == 1) return;
  const AddSplits add{partial, plan.splits, y};
  Launch(stream, {DivideUp(y.batch * y.rows, kThreads), 1, 1}, 0, add);
}

// y = x W^T for at most kBatchBlock rows.
template <class Source>
void MultiplyBlock(const Task& task, const Source& source, const void* x, const Output& y,
                   char* scratch, cudaStream_t stream) {
  const Plan plan = PlanFor(task, SizeOf(source), CurrentDevice());
  const Columns columns = PrepareColumns(task, plan, x, scratch, stream);
  if (plan.tiles == 1) {
    const SmallProduct<Source> kernel{source, columns, y};
    return Launch(stream, {task.panels, 1, 1}, kernel.SharedBytes(), kernel);
  }
  if constexpr (!Source::kFewForms) {
    if (plan.tiles == 2) return LaunchTiled<2>(task, plan, source, columns, y, scratch, stream);
    if (plan.tiles == 16) return LaunchTiled<16>(task, plan, source, columns, y, scratch, stream);
  }
  LaunchTiled<8>(task, plan, source, columns, y, scratch, stream);
}

// Memory for one product, aligned to 256 bytes.
struct Scratch {
  char* data;
  int64_t bytes;
};

// y = x W^T for any batch, block by block of its rows.
template <class Source>
void Multiply(Task task, const Source& source, const void* x, void* y, int64_t batch, float factor,
              const Scratch& scratch, cudaStream_t stream) {
  Require(batch >= 0, "batch is negative");
  const int64_t needed = ScratchFor(task, batch, SizeOf(source));
  Require(scratch.bytes >= needed, "scratch has " + std::to_string(scratch.bytes) +
                                       " bytes, must have " + std::to_string(needed));
  const int64_t size = task.type == Type::kFloat32 ? 4 : 2;
  for (int64_t first = 0; first < batch; first += kBatchBlock) {
    task.batch = std::min(kBatchBlock, batch - first);
    char* out = static_cast<char*>(y) + first * task.rows * size;
    const char* in = static_cast<const char*>(x) + first * task.cut.length * size;
    MultiplyBlock(task, source, in, Output{task.type, out, task.batch, task.rows, factor},
                  scratch.data, stream);
  }
}

}  // namespace onnxcomp::gpu
