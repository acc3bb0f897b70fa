// Blocks of GPU threads on a CPU: every thread is a fiber that runs the kernel's own code.
//
// Warps take turns in random order, so that what a kernel does not order by a barrier happens in
// some order that it did not expect. Asynchronous work is as late as a GPU may be: copies arrive
// when somebody waits for them, tensor cores read their operands when a wait asks for the sums, and
// stores to other blocks are seen after a fence. With ONNXCOMP_EMULATED_COPIES=eager it is as early
// as a GPU may be, which shows memory that is written again too soon. Shared memory starts as NaN
// and has guards behind it. Blocks run one after the other: what orders them among each other does
// not show, but a fence that is missing does.
//
// ONNXCOMP_EMULATED_FAULT plants a fault, for tests of the tests: "wait", "barrier", "warp",
// "phase", "fence" or "tensor", with ":i" for only the i-th of each thread's calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace onnxcomp::gpu::emulator {

// Runs `body` in `threads` threads of one block whose shared memory has `bytes` bytes.
//
// Throws std::runtime_error where threads wait for each other forever, or what a thread threw.
void RunBlock(int threads, int64_t bytes, const std::function<void(char* shared)>& body);

// Notes that a kernel was started; onnxcomp_emulated_kernels() gives the names since its last call, a
// line each.
void Note(const char* kernel);

// The number of the running thread in its block.
int ThreadIndex();

// Waits for all threads of the block, or for `threads` threads at barrier `number`.
void SyncBlock();
void SyncNamed(int number, int threads);

// Threads of a warp meet here; the last one calls act(all), where all[lane] is what each brought.
// `kind` is the name of the operation, which must be the same for all.
using Act = void (*)(void* const* all);
void MeetWarp(const char* kind, void* mine, Act act);
void SyncWarp();

// cp.async and its batches.
void CopyLater(void* shared, const void* global, int bytes);
void CloseCopies();
void AwaitCopies(int open);

// mbarriers in shared memory, and bulk copies that report to them.
void InitBarrier(const void* barrier, int arrivals);
void FenceBarriers();
void Arrive(const void* barrier);
void ArriveAndExpect(const void* barrier, int64_t bytes);
void AwaitPhase(const void* barrier, uint32_t parity);
void CopyBulk(void* shared, const void* global, int64_t bytes, const void* barrier);

// wgmma m64nNk16 with A from registers: sums (columns / 2 of each thread) += A B, where B lies in
// shared memory, K-major, in 128-byte swizzle, `offset` bytes behind a multiple of 1024.
void MultiplyGroup(int columns, float* sums, const uint32_t* a, const char* b, bool add);
void FenceGroup();
void CloseGroup();
void AwaitGroup(int open);

// A store that other blocks see after the thread's next fence; and that fence.
void StoreForOthers(void* global, const void* value, int bytes);
void Fence();

// The value of another lane.
template <class T>
T Shuffle(const T& value, int source) {
  struct Item {
    T in, out;
    int source;
  } item{value, value, source};
  MeetWarp("shuffle", &item, [](void* const* all) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* one = static_cast<Item*>(all[lane]);
      one->out = static_cast<Item*>(all[one->source & 31])->in;
    }
  });
  return item.out;
}

}  // namespace onnxcomp::gpu::emulator
