#include "gpu/emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/float16.h"
#include "gpu/fiber_switch.h"

namespace onnxcomp::gpu::emulator {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kLanes = 32;
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int64_t kGuard = 256;

struct Copy {
  void* to;
  const void* from;
  int64_t bytes;
  const void* barrier;
};

struct Fiber {
  void* stack_pointer;
  std::unique_ptr<char[]> stack;
  bool done;
  const uint32_t* watched;  // sleeps while this is `seen`
  uint32_t seen;
  std::deque<std::vector<Copy>> batches;
  std::vector<Copy> open;
  std::vector<std::pair<void*, std::vector<char>>> stores;
  size_t issued;                // products of its warpgroup
  std::deque<size_t> products;  // batches of them: issued at its end
  bool group_fenced;
  std::unordered_map<std::string, int> calls;  // for planted faults
};

struct Meeting {
  void* item[kLanes];
  int count;
  uint32_t generation;
  const char* kind;
};

struct Counter {
  int count;
  uint32_t generation;
};

struct Barrier {
  int arrivals, pending;
  int64_t bytes;  // of copies that are to come
  uint32_t phase;
  bool fenced;
};

// One wgmma of a warpgroup.
struct Product {
  int columns;
  float* sums[kGroup];
  const uint32_t* a[kGroup];
  const char* b;
  bool add;
  uint32_t arrived;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::unordered_map<int, Counter> counters;
  std::unordered_map<const void*, Barrier> barriers;
  std::vector<Copy> bulk;
  std::vector<std::deque<Product>> groups;
  std::vector<size_t> executed;
  std::vector<char> memory;
  char* shared;
  int64_t bytes;
  int threads, current;
  void* scheduler;
  const std::function<void(char*)>* body;
  std::exception_ptr failure;
  bool eager;
  std::string fault;
  int fault_index;
  std::mt19937 random{1};
};

thread_local Machine machine;

Fiber& Current() { return machine.fibers[static_cast<size_t>(machine.current)]; }

[[noreturn]] void Wrong(const std::string& text) {
  throw std::runtime_error("emulated GPU: " + text);
}

std::string& Kernels() {
  thread_local std::string names;
  return names;
}

// Whether this call of the thread is to be left out or done wrongly.
bool Planted(const char* kind) {
  if (machine.fault != kind) return false;
  const int call = Current().calls[kind]++;
  return machine.fault_index < 0 || machine.fault_index == call;
}

void Yield() { onnxcomp_emulator_switch(&Current().stack_pointer, machine.scheduler); }

// Sleeps until the word is no longer `seen`.
void Sleep(const uint32_t* word, uint32_t seen) {
  Current().watched = word;
  Current().seen = seen;
  while (*word == seen) Yield();
  Current().watched = nullptr;
}

void FlushStores(Fiber& fiber) {
  for (auto& [to, value] : fiber.stores) std::memcpy(to, value.data(), value.size());
  fiber.stores.clear();
}

void EnterFiber() {
  try {
    (*machine.body)(machine.shared);
    FlushStores(Current());
  } catch (...) {
    machine.failure = std::current_exception();
  }
  Current().done = true;
  Yield();
}

void StartFiber(Fiber& fiber) {
  if (fiber.stack == nullptr) fiber.stack.reset(new char[kStack]);
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) & ~uintptr_t{15};
  auto* words = reinterpret_cast<void**>(top) - kAbove - 1;
  words[0] = reinterpret_cast<void*>(&EnterFiber);
  words -= kSaved;
  std::memset(words, 0, sizeof(void*) * kSaved);
  fiber.stack_pointer = words;
  fiber.done = false;
  fiber.watched = nullptr;
  fiber.batches.clear();
  fiber.open.clear();
  fiber.stores.clear();
  fiber.issued = 0;
  fiber.products.clear();
  fiber.group_fenced = false;
  fiber.calls.clear();
}

void Land(const Copy& copy) {
  const auto* to = static_cast<char*>(copy.to);
  if (to < machine.shared || to + copy.bytes > machine.shared + machine.bytes) {
    Wrong("a copy leaves shared memory");
  }
  const auto aligned = reinterpret_cast<uintptr_t>(copy.from) | static_cast<uintptr_t>(to - machine.shared);
  if (aligned % (copy.bytes < 16 ? 4 : 16) != 0) Wrong("a copy is not aligned");
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
}

Barrier& BarrierAt(const void* place) {
  const auto found = machine.barriers.find(place);
  if (found == machine.barriers.end()) Wrong("a barrier was not initialised");
  return found->second;
}

void Turn(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.arrivals;
}

bool LandBulk() {
  const bool any = !machine.bulk.empty();
  std::vector<Copy> copies;
  copies.swap(machine.bulk);
  for (const Copy& copy : copies) {
    Land(copy);
    Barrier& barrier = BarrierAt(copy.barrier);
    barrier.bytes -= copy.bytes;
    Turn(barrier);
  }
  return any;
}

bool RunWarp(int warp) {
  bool any = false;
  const int first = warp * kLanes;
  const int count = std::min(kLanes, machine.threads - first);
  const int start = static_cast<int>(machine.random() % static_cast<unsigned>(count));
  for (int i = 0; i < count; ++i) {
    machine.current = first + (start + i) % count;
    Fiber& fiber = Current();
    if (fiber.done || (fiber.watched != nullptr && *fiber.watched == fiber.seen)) continue;
    onnxcomp_emulator_switch(&machine.scheduler, fiber.stack_pointer);
    any = true;
    if (machine.failure) std::rethrow_exception(machine.failure);
  }
  return any;
}

void RunFibers() {
  std::vector<int> order((static_cast<size_t>(machine.threads) + kLanes - 1) / kLanes);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  const auto done = [](const Fiber& fiber) { return fiber.done; };
  const auto end = machine.fibers.begin() + machine.threads;
  while (!std::all_of(machine.fibers.begin(), end, done)) {
    std::shuffle(order.begin(), order.end(), machine.random);
    bool any = false;
    for (const int warp : order) {
      for (unsigned rounds = 1 + machine.random() % 20; rounds > 0 && RunWarp(warp); --rounds) {
        any = true;
      }
    }
    if (!any && !LandBulk()) Wrong("threads wait for each other forever");
  }
}

void Start(int threads, int64_t bytes) {
  machine.threads = threads;
  machine.bytes = bytes;
  if (machine.fibers.size() < static_cast<size_t>(threads)) {
    machine.fibers.resize(static_cast<size_t>(threads));
  }
  machine.memory.assign(static_cast<size_t>(bytes + 2 * kGuard + 1024), '\xff');
  const auto at = reinterpret_cast<uintptr_t>(machine.memory.data());
  machine.shared = machine.memory.data() + (1024 - at % 1024) % 1024;
  machine.warps.assign((static_cast<size_t>(threads) + kLanes - 1) / kLanes, Meeting{});
  machine.counters.clear();
  machine.barriers.clear();
  machine.bulk.clear();
  machine.groups.assign((static_cast<size_t>(threads) + kGroup - 1) / kGroup, {});
  machine.executed.assign(machine.groups.size(), 0);
  machine.failure = nullptr;
  const char* copies = std::getenv("ONNXCOMP_EMULATED_COPIES");
  machine.eager = copies != nullptr && std::string(copies) == "eager";
  const char* fault = std::getenv("ONNXCOMP_EMULATED_FAULT");
  machine.fault = fault == nullptr ? "" : fault;
  const size_t colon = machine.fault.find(':');
  machine.fault_index = -1;
  if (colon != std::string::npos) {
    machine.fault_index = std::atoi(machine.fault.c_str() + colon + 1);
    machine.fault.resize(colon);
  }
}

void Count(int key, int threads) {
  Counter& counter = machine.counters[key];
  const uint32_t seen = counter.generation;
  if (++counter.count == threads) {
    counter.count = 0;
    ++counter.generation;
  } else {
    Sleep(&machine.counters[key].generation, seen);
  }
}

// B of one product, (columns, 16).
std::vector<float> ReadColumns(const Product& product) {
  std::vector<float> b(static_cast<size_t>(product.columns) * 16);
  const int64_t begin = product.b - machine.shared;
  for (int n = 0; n < product.columns; ++n) {
    for (int k = 0; k < 16; ++k) {
      const int64_t line = begin + n / 8 * 1024 + n % 8 * 128 + k * 2;
      const int64_t place = line ^ (((line >> 7) & 7) << 4);
      if (place < 0 || place + 2 > machine.bytes) Wrong("wgmma reads outside shared memory");
      uint16_t half = 0;
      std::memcpy(&half, machine.shared + place, 2);
      b[static_cast<size_t>(n * 16 + k)] = HalfToFloat(half);
    }
  }
  return b;
}

void Execute(const Product& product) {
  const std::vector<float> b = ReadColumns(product);
  for (int thread = 0; thread < kGroup; ++thread) {
    const int lane = thread % kLanes;
    float a[2][16];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) {
        const int owner = thread - lane + lane / 4 * 4 + k % 8 / 2;
        const uint32_t* words = product.a[owner];
        const uint32_t word = words == nullptr ? ~0u : words[half + k / 8 * 2];
        a[half][k] = HalfToFloat(static_cast<uint16_t>(word >> (k % 2 * 16)));
      }
    }
    if (product.sums[thread] == nullptr) continue;
    for (int i = 0; i < product.columns / 2; ++i) {
      const int column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      double sum = product.add ? static_cast<double>(product.sums[thread][i]) : 0.0;
      for (int k = 0; k < 16; ++k) {
        sum += static_cast<double>(a[i / 2 % 2][k]) * b[static_cast<size_t>(column * 16 + k)];
      }
      product.sums[thread][i] = static_cast<float>(sum);
    }
  }
}

void ExecuteUntil(size_t group, size_t end) {
  while (machine.executed[group] < end) {
    const size_t index = machine.executed[group];
    const Product& product = machine.groups[group][index];
    if (product.arrived < kGroup) {
      Sleep(&product.arrived, product.arrived);
    } else {
      Execute(product);
      machine.executed[group] = index + 1;
    }
  }
}

}  // namespace

void RunBlock(int threads, int64_t bytes, const std::function<void(char*)>& body) {
  Start(threads, bytes);
  machine.body = &body;
  for (int i = 0; i < threads; ++i) StartFiber(machine.fibers[static_cast<size_t>(i)]);
  RunFibers();
  const char* guard = machine.shared + bytes;
  if (std::any_of(guard, guard + kGuard, [](char byte) { return byte != '\xff'; })) {
    Wrong("something was written behind shared memory");
  }
}

void Note(const char* kernel) { Kernels() += std::string(kernel) + "\n"; }

int ThreadIndex() { return machine.current; }

void SyncBlock() {
  if (!Planted("barrier")) Count(-1, machine.threads);
}

void SyncNamed(int number, int threads) {
  if (!Planted("barrier")) Count(number, threads);
}

void MeetWarp(const char* kind, void* mine, Act act) {
  Meeting& meeting = machine.warps[static_cast<size_t>(machine.current / kLanes)];
  if (meeting.count == 0) meeting.kind = kind;
  if (std::strcmp(meeting.kind, kind) != 0) {
    Wrong("lanes of a warp meet in " + std::string(meeting.kind) + " and " + kind);
  }
  meeting.item[machine.current % kLanes] = mine;
  const uint32_t seen = meeting.generation;
  if (++meeting.count == std::min(kLanes, machine.threads)) {
    meeting.count = 0;
    act(meeting.item);
    ++meeting.generation;
  } else {
    Sleep(&meeting.generation, seen);
  }
}

void SyncWarp() {
  if (!Planted("warp")) MeetWarp("__syncwarp", nullptr, [](void* const*) {});
}

void CopyLater(void* shared, const void* global, int bytes) {
  const Copy copy{shared, global, bytes, nullptr};
  if (machine.eager) Land(copy);
  else Current().open.push_back(copy);
}

void CloseCopies() {
  Current().batches.push_back(std::move(Current().open));
  Current().open.clear();
}

void AwaitCopies(int open) {
  if (Planted("wait")) return;
  auto& batches = Current().batches;
  for (; batches.size() > static_cast<size_t>(open); batches.pop_front()) {
    for (const Copy& copy : batches.front()) Land(copy);
  }
}

void InitBarrier(const void* barrier, int arrivals) {
  machine.barriers[barrier] = {arrivals, arrivals, 0, 0, false};
}

void FenceBarriers() {
  if (Planted("fence")) return;
  for (auto& [place, barrier] : machine.barriers) barrier.fenced = true;
}

void Arrive(const void* place) {
  Barrier& barrier = BarrierAt(place);
  if (barrier.pending == 0) Wrong("too many threads arrive at a barrier");
  --barrier.pending;
  Turn(barrier);
}

void ArriveAndExpect(const void* place, int64_t bytes) {
  BarrierAt(place).bytes += bytes;
  Arrive(place);
}

void AwaitPhase(const void* place, uint32_t parity) {
  const Barrier& barrier = BarrierAt(place);
  const uint32_t old = (parity ^ (Planted("phase") ? 1u : 0u)) & 1u;
  if (barrier.phase == old) Sleep(&barrier.phase, old);
}

void CopyBulk(void* shared, const void* global, int64_t bytes, const void* barrier) {
  if (!BarrierAt(barrier).fenced) Wrong("a bulk copy uses a barrier before the fence");
  machine.bulk.push_back({shared, global, bytes, barrier});
  if (machine.eager) LandBulk();
}

void MultiplyGroup(int columns, float* sums, const uint32_t* a, const char* b, bool add) {
  if (!Current().group_fenced) Wrong("wgmma without a fence after its registers were written");
  const auto group = static_cast<size_t>(machine.current / kGroup);
  auto& products = machine.groups[group];
  const size_t index = Current().issued++;
  if (index == products.size()) products.push_back({columns, {}, {}, b, add, 0});
  Product& product = products[index];
  if (product.b != b || product.columns != columns || product.add != add) {
    Wrong("threads of a warpgroup multiply different matrices");
  }
  product.sums[machine.current % kGroup] = sums;
  product.a[machine.current % kGroup] = a;
  ++product.arrived;
  if (machine.eager && product.arrived == kGroup) ExecuteUntil(group, index + 1);
}

void FenceGroup() {
  if (!Planted("fence")) Current().group_fenced = true;
}

void CloseGroup() { Current().products.push_back(Current().issued); }

void AwaitGroup(int open) {
  const auto group = static_cast<size_t>(machine.current / kGroup);
  if (Planted("tensor")) {
    // The thread goes on, and what it did not wait for never comes to its registers.
    for (size_t i = machine.executed[group]; i < Current().issued; ++i) {
      machine.groups[group][i].sums[machine.current % kGroup] = nullptr;
      machine.groups[group][i].a[machine.current % kGroup] = nullptr;
    }
    return;
  }
  Current().group_fenced = false;
  auto& batches = Current().products;
  for (; batches.size() > static_cast<size_t>(open); batches.pop_front()) {
    ExecuteUntil(group, batches.front());
  }
}

void StoreForOthers(void* global, const void* value, int bytes) {
  const auto* begin = static_cast<const char*>(value);
  Current().stores.emplace_back(global, std::vector<char>(begin, begin + bytes));
  if (machine.eager) FlushStores(Current());
}

void Fence() {
  if (!Planted("fence")) FlushStores(Current());
}

}  // namespace onnxcomp::gpu::emulator

extern "C" __attribute__((visibility("default"))) const char* onnxcomp_emulated_kernels() {
  thread_local std::string last;
  last.swap(onnxcomp::gpu::emulator::Kernels());
  onnxcomp::gpu::emulator::Kernels().clear();
  return last.c_str();
}
