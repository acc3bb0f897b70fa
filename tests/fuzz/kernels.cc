// Feeds mutated nodes and payloads to the operators of a library, through the ABI it is loaded by.
//
//   kernels LIBRARY [COUNT [SEED]]
//
// The runtime is played by a table of functions that hold every tensor in a block of exactly its
// size, so that a sanitizer sees each byte read or written outside. Build the driver and the
// library with -fsanitize=address,undefined; tests/fuzz/run.sh does. A case is found again by
// COUNT 1 and the seed that is printed when it fails.

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "abi.h"

using onnxcomp::ElementType;

namespace {

using Dims = std::vector<int64_t>;

constexpr int64_t kLargest = int64_t{1} << 26;  // bytes of a tensor this runtime allocates
constexpr unsigned kHang = 10;                  // seconds
constexpr uint32_t kUnwritten = 0xffc5a5c5u;    // a NaN that no kernel makes

uint64_t current_seed = 0;

size_t SizeOf(int type) {
  switch (type) {
    case onnxcomp::kUint8:
    case onnxcomp::kInt8:
      return 1;
    case onnxcomp::kFloat16:
    case onnxcomp::kBfloat16:
      return 2;
    case onnxcomp::kInt64:
      return 8;
    default:
      return 4;
  }
}

// A tensor in memory of exactly its size, `shift` bytes off the alignment of malloc.
struct Value {
  int type = 0;
  Dims dims;
  std::unique_ptr<char[]> block;
  size_t shift = 0;

  Value() = default;
  Value(int type_in, Dims dims_in, size_t shift_in = 0)
      : type(type_in), dims(std::move(dims_in)), shift(shift_in) {
    block.reset(new char[bytes() + shift]);
  }
  int64_t count() const {
    int64_t n = 1;
    for (int64_t dim : dims) n *= dim;
    return n;
  }
  size_t bytes() const { return static_cast<size_t>(count()) * SizeOf(type); }
  char* data() const { return block.get() + shift; }
};

struct Attribute {
  bool many = false;
  int64_t one = 0;
  Dims ints;
};

struct Node {
  std::map<std::string, Attribute> attributes;
  std::vector<Value> inputs;
  std::vector<bool> constant;
  Value output;
  bool has_output = false;
  bool failing_parallel = false;
};

struct Shape {
  int type = 0;
  Dims dims;
  std::vector<std::string> symbols;
};

// ---- the runtime -------------------------------------------------------------------------------

std::vector<const OrtCustomOp*> registered;
int64_t open_statuses = 0;

template <class T>
T* As(const void* pointer) {
  return static_cast<T*>(const_cast<void*>(pointer));
}

OrtStatus* MakeStatus(int, const char* message) {
  ++open_statuses;
  return reinterpret_cast<OrtStatus*>(new std::string(message));
}
const char* Message(const OrtStatus* status) {
  return reinterpret_cast<const std::string*>(status)->c_str();
}
void Release(OrtStatus* status) {
  --open_statuses;
  delete reinterpret_cast<std::string*>(status);
}
OrtStatus* Bad(const char* why) { return MakeStatus(1, why); }

OrtStatus* MakeDomain(const char*, OrtCustomOpDomain** out) {
  *out = reinterpret_cast<OrtCustomOpDomain*>(&registered);
  return nullptr;
}
OrtStatus* DomainAdd(OrtCustomOpDomain*, const OrtCustomOp* op) {
  // Operators of another provider need its device.
  if (op->GetExecutionProviderType(op) == nullptr) registered.push_back(op);
  return nullptr;
}
OrtStatus* AddDomain(OrtSessionOptions*, OrtCustomOpDomain*) { return nullptr; }

OrtStatus* MutableData(OrtValue* value, void** out) {
  *out = As<Value>(value)->data();
  return nullptr;
}
OrtStatus* TypeAndShape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) {
  const Value& tensor = *As<Value>(value);
  *out = reinterpret_cast<OrtTensorTypeAndShapeInfo*>(new Shape{tensor.type, tensor.dims, {}});
  return nullptr;
}
OrtStatus* MakeShape(OrtTensorTypeAndShapeInfo** out) {
  *out = reinterpret_cast<OrtTensorTypeAndShapeInfo*>(new Shape);
  return nullptr;
}
void ReleaseShape(OrtTensorTypeAndShapeInfo* info) { delete As<Shape>(info); }
OrtStatus* SetType(OrtTensorTypeAndShapeInfo* info, int type) {
  As<Shape>(info)->type = type;
  return nullptr;
}
OrtStatus* SetDims(OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t n) {
  As<Shape>(info)->dims.assign(dims, dims + n);
  return nullptr;
}
OrtStatus* GetType(const OrtTensorTypeAndShapeInfo* info, int* out) {
  *out = As<Shape>(info)->type;
  return nullptr;
}
OrtStatus* GetRank(const OrtTensorTypeAndShapeInfo* info, size_t* out) {
  *out = As<Shape>(info)->dims.size();
  return nullptr;
}
OrtStatus* GetDims(const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t n) {
  const Dims& dims = As<Shape>(info)->dims;
  std::copy_n(dims.begin(), std::min(n, dims.size()), out);
  return nullptr;
}
OrtStatus* GetSymbols(const OrtTensorTypeAndShapeInfo* info, const char** out, size_t n) {
  const Shape& shape = *As<Shape>(info);
  for (size_t i = 0; i < n; ++i) {
    out[i] = i < shape.symbols.size() ? shape.symbols[i].c_str() : "";
  }
  return nullptr;
}
OrtStatus* SetSymbols(OrtTensorTypeAndShapeInfo* info, const char** names, size_t n) {
  As<Shape>(info)->symbols.assign(names, names + n);
  return nullptr;
}

OrtStatus* InfoInt(const OrtKernelInfo* info, const char* name, int64_t* out) {
  const Node& node = *As<Node>(info);
  const auto found = node.attributes.find(name);
  if (found == node.attributes.end() || found->second.many) return Bad("no such int");
  *out = found->second.one;
  return nullptr;
}
OrtStatus* InfoInts(const OrtKernelInfo* info, const char* name, int64_t* out, size_t* size) {
  const Node& node = *As<Node>(info);
  const auto found = node.attributes.find(name);
  if (found == node.attributes.end() || !found->second.many) return Bad("no such ints");
  const Dims& ints = found->second.ints;
  if (out == nullptr) {
    *size = ints.size();
    return nullptr;
  }
  if (*size < ints.size()) return Bad("too little room");
  std::copy(ints.begin(), ints.end(), out);
  return nullptr;
}
OrtStatus* InfoName(const OrtKernelInfo*, char* out, size_t* size) {
  const char name[] = "node";
  if (out != nullptr) std::memcpy(out, name, std::min(*size, sizeof name));
  *size = sizeof name;
  return nullptr;
}
OrtStatus* InfoConstant(const OrtKernelInfo* info, size_t i, int* constant, const OrtValue** out) {
  const Node& node = *As<Node>(info);
  if (i >= node.inputs.size()) return Bad("no such input");
  *constant = node.constant[i];
  *out = node.constant[i] ? reinterpret_cast<const OrtValue*>(&node.inputs[i]) : nullptr;
  return nullptr;
}
OrtStatus* ContextInput(const OrtKernelContext* context, size_t i, const OrtValue** out) {
  const Node& node = *As<Node>(context);
  if (i >= node.inputs.size()) return Bad("no such input");
  *out = reinterpret_cast<const OrtValue*>(&node.inputs[i]);
  return nullptr;
}
OrtStatus* ContextOutput(OrtKernelContext* context, size_t, const int64_t* dims, size_t n,
                         OrtValue** out) {
  Node& node = *As<Node>(context);
  int64_t count = 1;
  for (size_t i = 0; i < n; ++i) {
    if (dims[i] < 0 || __builtin_mul_overflow(count, dims[i], &count)) return Bad("bad dims");
  }
  if (count > kLargest / 4) return Bad("out of memory");
  node.output = Value(node.output.type, Dims(dims, dims + n));
  for (size_t i = 0; i < node.output.bytes(); ++i) {
    node.output.data()[i] = static_cast<char>(kUnwritten >> (8 * (i % 4)));
  }
  node.has_output = true;
  *out = reinterpret_cast<OrtValue*>(&node.output);
  return nullptr;
}
OrtStatus* Parallel(const OrtKernelContext* context, void (*fn)(void*, size_t), size_t total,
                    size_t, void* user) {
  if (As<Node>(context)->failing_parallel) return Bad("the thread pool is gone");
  for (size_t i = total; i-- > 0;) fn(user, i);  // no order is promised
  return nullptr;
}

OrtStatus* InferInput(const OrtShapeInferContext* context, size_t i,
                      OrtTensorTypeAndShapeInfo** out) {
  static Shape shapes[16];  // owned by the runtime
  const Node& node = *As<Node>(context);
  if (i >= node.inputs.size()) return Bad("no such input");
  shapes[i] = Shape{node.inputs[i].type, node.inputs[i].dims, {}};
  if (node.failing_parallel) std::fill(shapes[i].dims.begin(), shapes[i].dims.end(), -1);
  *out = reinterpret_cast<OrtTensorTypeAndShapeInfo*>(&shapes[i]);
  return nullptr;
}
OrtStatus* InferAttribute(const OrtShapeInferContext* context, const char* name,
                          const OrtOpAttr** out) {
  const Node& node = *As<Node>(context);
  const auto found = node.attributes.find(name);
  if (found == node.attributes.end()) return Bad("no such attribute");
  *out = reinterpret_cast<const OrtOpAttr*>(&found->second);
  return nullptr;
}
OrtStatus* InferOutput(const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*) {
  return nullptr;
}
OrtStatus* ReadAttribute(const OrtOpAttr* raw, int kind, void* out, size_t room, size_t* needed) {
  const Attribute& attribute = *As<Attribute>(raw);
  if (attribute.many != (kind == onnxcomp::kAttributeInts)) return Bad("another kind");
  const Dims one{attribute.one};
  const Dims& ints = attribute.many ? attribute.ints : one;
  *needed = ints.size() * sizeof(int64_t);
  if (*needed > room) return Bad("too little room");
  if (!ints.empty()) std::memcpy(out, ints.data(), *needed);
  return nullptr;
}

OrtStatus* HasEntry(const OrtSessionOptions*, const char*, int* out) {
  *out = 0;
  return nullptr;
}
OrtStatus* AddEntry(OrtSessionOptions*, const char*, const char*) { return nullptr; }

void Missing() {
  std::fprintf(stderr, "a function of the runtime is called that the driver does not play\n");
  std::abort();
}

using Slot = void (*)();
Slot slots[320];

const OrtApi* GetApi(uint32_t) { return reinterpret_cast<const OrtApi*>(slots); }
const char* Version() { return "1.31.0"; }
const OrtApiBase kBase{GetApi, Version};

template <class F>
void Set(size_t slot, F* function) {
  slots[slot] = reinterpret_cast<Slot>(function);
}

void FillSlots() {
  std::fill(std::begin(slots), std::end(slots), Missing);
  Set(0, MakeStatus), Set(2, Message), Set(93, Release);
  Set(26, MakeDomain), Set(27, DomainAdd), Set(28, AddDomain);
  Set(130, AddEntry), Set(237, HasEntry);
  Set(51, MutableData), Set(65, TypeAndShape), Set(57, MakeShape), Set(99, ReleaseShape);
  Set(58, SetType), Set(59, SetDims), Set(60, GetType), Set(61, GetRank), Set(62, GetDims);
  Set(63, GetSymbols), Set(271, SetSymbols);
  Set(86, InfoInt), Set(163, InfoInts), Set(244, InfoName), Set(249, InfoConstant);
  Set(90, ContextInput), Set(91, ContextOutput), Set(274, Parallel);
  Set(268, InferInput), Set(269, InferAttribute), Set(270, InferOutput), Set(272, ReadAttribute);
}

// ---- cases -------------------------------------------------------------------------------------

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t Between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  bool Chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  template <class T>
  T Pick(std::initializer_list<T> from) {
    return *(from.begin() + Between(0, static_cast<int64_t>(from.size()) - 1));
  }
  void Fill(Value& value) {
    char* out = value.data();
    for (size_t i = 0; i < value.bytes(); i += 8) {
      const uint64_t bits = engine_();
      std::memcpy(out + i, &bits, std::min<size_t>(8, value.bytes() - i));
    }
  }
  int64_t Odd() {  // an integer that somebody may not have thought of
    return Pick<int64_t>({0, 1, -1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 128, 255, 256, 257, 512,
                          int64_t{1} << 31, (int64_t{1} << 32) + 32, int64_t{1} << 40,
                          (int64_t{1} << 40) + 1, int64_t{1} << 62, INT64_MAX, INT64_MIN,
                          Between(-300, 1000)});
  }

 private:
  std::mt19937_64 engine_;
};

void FillFloats(Random& random, Value& value, double odd) {
  random.Fill(value);
  if (value.type == onnxcomp::kFloat) {
    auto* out = reinterpret_cast<float*>(value.data());
    for (int64_t i = 0; i < value.count(); ++i) {
      if (!random.Chance(odd)) out[i] = static_cast<float>(random.Between(-1000, 1000)) / 300.0f;
    }
  }
}

struct Case {
  Node node;
  const OrtCustomOp* op;
  std::string name;
  size_t first = 0;  // index of the first input that describes the weight
  size_t parts = 0;  // and how many there are
  int mutations = 0;
};

void Resize(Random& random, Value& value, Dims dims) {
  int64_t count = 1;
  for (int64_t& dim : dims) {
    dim = std::clamp<int64_t>(dim, 0, 5000);
    if (count * dim > (1 << 18)) dim = 1;
    count *= dim;
  }
  value = Value(value.type, dims, value.shift);
  random.Fill(value);
}

void MutateDims(Random& random, Value& value) {
  Dims dims = value.dims;
  switch (random.Between(0, 4)) {
    case 0:
      if (!dims.empty()) dims.pop_back();
      break;
    case 1:
      dims.push_back(random.Between(0, 4));
      break;
    case 2:
      if (!dims.empty()) dims[random.Between(0, static_cast<int64_t>(dims.size()) - 1)] += 1;
      break;
    case 3:
      if (!dims.empty()) dims[random.Between(0, static_cast<int64_t>(dims.size()) - 1)] -= 1;
      break;
    default:
      if (!dims.empty()) {
        dims[random.Between(0, static_cast<int64_t>(dims.size()) - 1)] = random.Between(0, 300);
      }
  }
  Resize(random, value, dims);
}

int64_t OneOff(Random& random, int64_t value) {
  return static_cast<int64_t>(static_cast<uint64_t>(value) +
                              static_cast<uint64_t>(random.Between(-1, 1)));
}

void MutateAttribute(Random& random, Node& node) {
  const std::string name = random.Pick<const char*>({"extent", "extent", "group", "dtype",
                                                     "precision", "columns"});
  Attribute& attribute = node.attributes[name];
  switch (random.Between(0, 4)) {
    case 0:
      node.attributes.erase(name);
      break;
    case 1:
      attribute.many = !attribute.many;
      break;
    case 2:
      attribute.one = random.Odd();
      attribute.ints.resize(static_cast<size_t>(random.Between(0, 12)), random.Odd());
      break;
    case 3:
      for (int64_t& value : attribute.ints) {
        if (random.Chance(0.5)) value = random.Odd();
      }
      attribute.one = random.Odd();
      break;
    default:  // one off, either way round the largest
      for (int64_t& value : attribute.ints) value = OneOff(random, value);
      attribute.one = OneOff(random, attribute.one);
  }
}

// Overwrites one element, of whatever size, with something odd.
void MutateElement(Random& random, Value& value) {
  if (value.count() == 0) return;
  const size_t size = SizeOf(value.type);
  const int64_t odd = random.Chance(0.5) ? random.Odd() : random.Between(INT64_MIN, INT64_MAX);
  const auto at = static_cast<size_t>(random.Between(0, value.count() - 1));
  std::memcpy(value.data() + at * size, &odd, size);
}

void Mutate(Random& random, Case& made) {
  Node& node = made.node;
  const auto last = static_cast<int64_t>(made.parts) - 1;
  const auto pick = [&] { return made.first + static_cast<size_t>(random.Between(0, last)); };
  const bool hyper = made.name.rfind("Hyper", 0) == 0;
  const auto operands = static_cast<int64_t>(std::max<size_t>(made.first, 1));
  switch (random.Between(0, 7)) {
    case 0:
    case 1:
      MutateAttribute(random, node);
      break;
    case 2:
      MutateDims(random, node.inputs[pick()]);
      break;
    case 3:
      MutateDims(random, node.inputs[static_cast<size_t>(random.Between(0, operands - 1))]);
      break;
    case 4: {  // any table length
      const size_t at = hyper ? made.first + 2 : pick();
      Resize(random, node.inputs[at], {int64_t{1} << random.Between(0, 13)});
      break;
    }
    case 5: {
      Value& table = node.inputs[hyper ? made.first + 2 : pick()];
      if (!hyper) {
        MutateElement(random, table);
      } else if (table.count() > 0) {
        table.data()[random.Between(0, table.count() - 1)] = -128;
      }
      break;
    }
    case 6:
      MutateElement(random, node.inputs[random.Chance(0.5)
                                            ? static_cast<size_t>(random.Between(0, operands - 1))
                                            : pick()]);
      break;
    default:
      node.failing_parallel = true;
  }
  ++made.mutations;
}

// The input that meets the weight: activations with `length` columns, or row numbers.
void AddOperand(Random& random, Case& made, int64_t rows, int64_t length) {
  made.first = 1;
  Dims dims;
  for (int64_t n = random.Between(0, 2); n > 0; --n) dims.push_back(random.Between(0, 7));
  if (random.Chance(0.005)) dims = {random.Between(100, 400)};
  const bool gather = made.name.find("Gather") != std::string::npos;
  if (!gather) dims.push_back(length);
  made.node.inputs.emplace_back(made.op->GetInputType(made.op, 0), dims);
  Value& x = made.node.inputs[0];
  FillFloats(random, x, 0.05);
  for (int64_t i = 0; gather && i < x.count(); ++i) {
    const int64_t index = random.Between(-rows, rows - 1);
    std::memcpy(x.data() + i * static_cast<int64_t>(SizeOf(x.type)), &index, SizeOf(x.type));
  }
}

// For HyperExperts: activations whose batch fits to that of the indices, (..., a, b) to (..., a, 1)
// for example, and the indices.
void AddExperts(Random& random, Case& made, int64_t experts, int64_t length) {
  Node& node = made.node;
  made.first = 2;
  Dims batch, chosen;
  for (int64_t n = random.Between(0, 2); n > 0; --n) {
    const int64_t dim = random.Between(0, 5);
    batch.push_back(random.Chance(0.3) ? 1 : dim);
    chosen.push_back(random.Chance(0.3) ? 1 : dim);
  }
  Dims& longer = random.Chance(0.5) ? batch : chosen;
  if (random.Chance(0.3)) longer.insert(longer.begin(), random.Between(0, 4));
  if (!batch.empty() || random.Chance(0.7)) batch.push_back(random.Between(0, 5));
  batch.push_back(length);
  node.inputs.emplace_back(made.op->GetInputType(made.op, 0), batch);
  node.inputs.emplace_back(made.op->GetInputType(made.op, 1), chosen);
  FillFloats(random, node.inputs[0], 0.05);
  const Value& indices = node.inputs[1];
  const size_t size = SizeOf(indices.type);
  for (int64_t i = 0; i < indices.count(); ++i) {
    const int64_t index = random.Between(-experts, experts - 1);
    std::memcpy(indices.data() + static_cast<size_t>(i) * size, &index, size);
  }
  node.attributes["experts"] = {false, experts, {}};
}

// A table without -128; in many cases as encoders write it, which kernels may use: odd, or large and
// of 256 levels on a winding.
void FillTable(Random& random, Value& table, int states) {
  random.Fill(table);
  char* entries = table.data();
  const int64_t size = table.count();
  for (int64_t s = 0; s < size; ++s) {
    if (entries[s] == -128) entries[s] = 0;
  }
  if (random.Chance(0.5)) return;
  if (states > 8 && random.Chance(0.7)) {
    char values[256];
    for (int v = 0; v < 128; ++v) {
      values[v] = entries[v];
      values[255 - v] = static_cast<char>(-values[v]);
    }
    const int64_t multiplier = 2 * random.Between(0, size / 2 - 1) + 1;
    for (int64_t s = 0; s < size; ++s) {
      entries[s] = values[(multiplier * s + multiplier / 2) % size >> (states - 8)];
    }
    return;
  }
  for (int64_t s = 0; s < size / 2; ++s) entries[size - 1 - s] = static_cast<char>(-entries[s]);
}

void AddWeightOfHyper(Random& random, Case& made, int64_t rows, int64_t length, size_t shift) {
  Node& node = made.node;
  const int64_t group = random.Pick<int64_t>({32, 64, 128, 256});
  const int64_t bits = random.Between(1, 6);
  int states = 0;
  do states = random.Pick({6, 7, 8, 10, 12});
  while (states < bits + 2);
  const int64_t panels = (rows + 15) / 16, groups = (length + group - 1) / group;
  node.inputs.emplace_back(onnxcomp::kUint8, Dims{panels, groups, group * bits / 32, 16, 4}, shift);
  node.inputs.emplace_back(onnxcomp::kFloat16, Dims{panels, groups, 16, 1}, shift & ~size_t{1});
  node.inputs.emplace_back(onnxcomp::kInt8, Dims{int64_t{1} << states}, shift);
  made.parts = 3;
  for (size_t i = 0; i < 2; ++i) random.Fill(node.inputs[made.first + i]);
  FillTable(random, node.inputs[made.first + 2], states);
  node.attributes["group"] = {false, group, {}};
}

void SetInts(Value& value, const Dims& ints) {
  std::memcpy(value.data(), ints.data(), ints.size() * sizeof(int64_t));
}

void AddWeightOfHash(Random& random, Case& made, int64_t rows, int64_t length) {
  Node& node = made.node;
  const int64_t chunk = int64_t{4} << random.Between(0, 6);
  const int64_t slots = random.Between(1, random.Chance(0.5) ? 5 : 300);
  const int64_t panels = (rows + 15) / 16, blocks = (length + 15) / 16;
  const bool coded = random.Chance(0.5);
  const int type = made.op->GetInputType(made.op, made.first);
  node.inputs.emplace_back(type, Dims{slots, chunk});
  node.inputs.emplace_back(onnxcomp::kFloat, Dims{1});
  node.inputs.emplace_back(onnxcomp::kUint8,
                           coded ? Dims{panels, blocks, 256 / chunk} : Dims{1, 1, 1});
  node.inputs.emplace_back(onnxcomp::kInt64, Dims{6});
  made.parts = 4;
  FillFloats(random, node.inputs[made.first], 0.01);
  *reinterpret_cast<float*>(node.inputs[made.first + 1].data()) = 0.25f;
  Value& codes = node.inputs[made.first + 2];
  std::memset(codes.data(), 0, codes.bytes());
  if (coded) random.Fill(codes);
  const auto word = [&] { return random.Between(0, (int64_t{1} << 31) - 1); };
  SetInts(node.inputs[made.first + 3], {random.Between(0, 100), random.Chance(0.5) ? slots : 1,
                                        word(), word(), word(), random.Between(0, 1)});
}

void AddWeightOfWinding(Random& random, Case& made, int64_t rows, int64_t length) {
  Node& node = made.node;
  const int64_t bits = random.Between(1, 16), full = int64_t{1} << bits;
  const int64_t points = random.Between((full + 3) / 4, full);
  const int64_t classes = (full + points - 1) / points;
  const int64_t groups = random.Between(1, 3);
  const int64_t blocks = (rows * length + 16 * groups - 1) / (16 * groups);
  node.inputs.emplace_back(onnxcomp::kUint8, Dims{groups, blocks, bits});
  node.inputs.emplace_back(onnxcomp::kFloat16, Dims{groups, 1, 1});
  node.inputs.emplace_back(onnxcomp::kFloat, Dims{2});
  node.inputs.emplace_back(onnxcomp::kFloat, Dims{classes});
  node.inputs.emplace_back(onnxcomp::kInt64, Dims{2});
  node.inputs.emplace_back(onnxcomp::kInt64, Dims{3});
  made.parts = 6;
  for (size_t i = 0; i < 4; ++i) FillFloats(random, node.inputs[i], 0.05);
  const int64_t order = int64_t{1} << 31;
  SetInts(node.inputs[4], {random.Between(0, order), random.Between(0, order)});
  SetInts(node.inputs[5], {full, points, random.Between(1, order)});
}

// A mask with `bytes` bytes in a row, no bit behind `length`; returns the bits that are set.
int64_t AddMask(Random& random, Node& node, int64_t rows, int64_t bytes, int64_t length) {
  Value mask(onnxcomp::kUint8, Dims{rows, bytes});
  random.Fill(mask);
  int64_t kept = 0;
  for (int64_t i = 0; i < rows * bytes; ++i) {
    auto bits = static_cast<uint8_t>(mask.data()[i]);
    const int64_t left = length - 8 * (i % bytes);
    if (left < 8) bits &= static_cast<uint8_t>(left <= 0 ? 0 : 0xff >> (8 - left));
    mask.data()[i] = static_cast<char>(bits);
    kept += __builtin_popcount(bits);
  }
  node.inputs.push_back(std::move(mask));
  return kept;
}

void AddWeightOfSparseInt(Random& random, Case& made, int64_t rows, int64_t length) {
  Node& node = made.node;
  const int64_t group = random.Pick<int64_t>({64, 128, 256}), bits = random.Pick<int64_t>({4, 8});
  const int64_t groups = (length + group - 1) / group, padded = groups * group;
  const bool paired = random.Chance(0.5);
  int64_t kept = 0;
  if (paired) {
    const int64_t bytes = (padded + 11) / 12;
    Value mask(onnxcomp::kUint8, Dims{rows, bytes});
    for (int64_t i = 0; i < rows * bytes; ++i) {
      mask.data()[i] = static_cast<char>(random.Between(0, 215));
    }
    node.inputs.push_back(std::move(mask));
    kept = 6 * rows * bytes;
  } else {
    kept = AddMask(random, node, rows, padded / 8, length);
  }
  node.inputs.emplace_back(onnxcomp::kUint8, Dims{((1 + kept) * bits + 7) / 8});
  node.inputs.emplace_back(onnxcomp::kFloat16, Dims{rows, groups, 1});
  made.parts = 3;
  Value& codes = node.inputs[made.first + 1];
  random.Fill(codes);
  for (int64_t i = 0; i < codes.count(); ++i) {
    if (i == 0 || codes.data()[i] == -128) codes.data()[i] = 0;
  }
  random.Fill(node.inputs[made.first + 2]);
  node.attributes["group"] = {false, group, {}};
  node.attributes["bits"] = {false, bits, {}};
  node.attributes["pattern"] = {true, 0, paired ? Dims{2, 4} : Dims{0, 8}};
}

void AddWeightOfSparse(Random& random, Case& made, int64_t rows, int64_t length) {
  Node& node = made.node;
  const int64_t kept = AddMask(random, node, rows, (length + 7) / 8, length);
  node.inputs.emplace_back(made.op->GetInputType(made.op, made.first + 1), Dims{1 + kept});
  made.parts = 2;
  Value& values = node.inputs[made.first + 1];
  FillFloats(random, values, 0.05);
  std::memset(values.data(), 0, SizeOf(values.type));
}

Case MakeCase(Random& random) {
  Case made;
  made.op = registered[static_cast<size_t>(
      random.Between(0, static_cast<int64_t>(registered.size()) - 1))];
  made.name = made.op->GetName(made.op);
  Node& node = made.node;
  const bool chosen = made.name.find("Experts") != std::string::npos;
  const int64_t experts = random.Between(1, 5);
  const int64_t rows = chosen ? 16 * experts * random.Between(1, 4) : random.Between(1, 50);
  const int64_t length = random.Between(1, random.Chance(0.2) ? 600 : 200);
  if (chosen) {
    AddExperts(random, made, experts, length);
  } else if (made.name.find("Decode") == std::string::npos) {
    AddOperand(random, made, rows, length);
  }
  const size_t shift = random.Chance(0.3) ? static_cast<size_t>(random.Between(1, 63)) : 0;
  if (made.name.rfind("Hyper", 0) == 0) {
    AddWeightOfHyper(random, made, rows, length, shift);
  } else if (made.name.rfind("Hash", 0) == 0) {
    AddWeightOfHash(random, made, rows, length);
  } else if (made.name.rfind("Winding", 0) == 0) {
    AddWeightOfWinding(random, made, rows, length);
  } else if (made.name.rfind("SparseInt", 0) == 0) {
    AddWeightOfSparseInt(random, made, rows, length);
  } else if (made.name.rfind("Sparse", 0) == 0) {
    AddWeightOfSparse(random, made, rows, length);
  } else {
    std::fprintf(stderr, "%s: no cases are made for this operator\n", made.name.c_str());
    std::exit(2);
  }
  const bool constant = random.Chance(0.8);
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    node.constant.push_back(constant && i >= made.first);
  }
  node.attributes["extent"] = {true, 0, {rows, length}};
  if (chosen || made.name.find("MatMul") != std::string::npos) {
    const bool int8 = node.inputs[made.first].type != onnxcomp::kFloat &&
                      (node.inputs[made.first].type != onnxcomp::kFloat16) && random.Chance(0.5);
    node.attributes["dtype"] = {false, node.inputs[0].type, {}};
    node.attributes["precision"] = {false, int8 ? 1 : 0, {}};
  }
  if (chosen || made.name == "HyperGather") node.attributes["columns"] = {true, 0, {length}};
  if (random.Chance(0.6)) {
    for (int64_t n = random.Between(1, 3); n > 0; --n) Mutate(random, made);
  }
  node.output.type = made.op->GetOutputType(made.op, 0);
  return made;
}

// ---- running -----------------------------------------------------------------------------------

struct Figures {
  int64_t valid = 0, mutated = 0, refused_at_creation = 0, refused_at_run = 0, ran = 0;
  double slowest = 0;
};

[[noreturn]] void Give(const char* what, const Case& made, const char* message = "") {
  std::fprintf(stderr, "seed %llu: %s %s %s\n", static_cast<unsigned long long>(current_seed),
               made.name.c_str(), what, message);
  std::exit(1);
}

// True when a float32 output still holds what it was filled with.
bool Unwritten(const Value& output) {
  if (output.type != onnxcomp::kFloat) return false;
  const auto* values = reinterpret_cast<const uint32_t*>(output.data());
  return std::find(values, values + output.count(), kUnwritten) != values + output.count();
}

void Run(Case& made, Figures& figures) {
  Node& node = made.node;
  auto* info = reinterpret_cast<OrtKernelInfo*>(&node);
  auto* context = reinterpret_cast<OrtKernelContext*>(&node);
  (made.mutations == 0 ? figures.valid : figures.mutated) += 1;
  OrtStatus* inferred =
      made.op->InferOutputShapeFn(made.op, reinterpret_cast<OrtShapeInferContext*>(&node));
  if (inferred != nullptr) Release(inferred);
  void* kernel = nullptr;
  OrtStatus* status = made.op->CreateKernelV2(made.op, GetApi(18), info, &kernel);
  if (status != nullptr) {
    if (made.mutations == 0) Give("refused a valid node:", made, Message(status));
    Release(status);
    ++figures.refused_at_creation;
    return;
  }
  status = made.op->KernelComputeV2(kernel, context);
  if (status == nullptr) {
    ++figures.ran;
    if (!node.has_output) Give("made no output", made);
    if (Unwritten(node.output)) Give("left a part of its output unwritten", made);
  } else {
    if (made.mutations == 0) Give("refused a valid run:", made, Message(status));
    Release(status);
    ++figures.refused_at_run;
  }
  made.op->KernelDestroy(kernel);
}

// Whether this machine can run an instruction set.
bool Runs(const char* isa) {
  setenv("ONNXCOMP_ISA", isa, 1);
  for (uint64_t seed = 0;; ++seed) {
    Random random(seed);
    Case made = MakeCase(random);
    if (made.mutations != 0) continue;
    void* kernel = nullptr;
    auto* info = reinterpret_cast<OrtKernelInfo*>(&made.node);
    OrtStatus* status = made.op->CreateKernelV2(made.op, GetApi(18), info, &kernel);
    if (status == nullptr) {
      made.op->KernelDestroy(kernel);
      return true;
    }
    Release(status);
    return false;
  }
}

void PrintSeed() {
  std::fprintf(stderr, "seed %llu\n", static_cast<unsigned long long>(current_seed));
}

}  // namespace

extern "C" void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s LIBRARY [COUNT [SEED]]\n", argv[0]);
    return 2;
  }
  const int64_t count = argc > 2 ? std::atoll(argv[2]) : 10000;
  const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1;
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(PrintSeed);
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  using Register = OrtStatus*(OrtSessionOptions*, const OrtApiBase*);
  FillSlots();
  auto* entry = reinterpret_cast<Register*>(dlsym(library, "RegisterCustomOps"));
  if (entry == nullptr || entry(nullptr, &kBase) != nullptr || registered.empty()) {
    std::fprintf(stderr, "%s registers no operators\n", argv[1]);
    return 2;
  }
  Figures figures;
  std::vector<std::string> isas;
  for (const char* isa : {"plain", "avx2", "avx2vnni", "avx512"}) {
    if (Runs(isa)) isas.emplace_back(isa);
  }
  for (int64_t i = 0; i < count; ++i) {
    current_seed = seed + static_cast<uint64_t>(i);
    Random random(current_seed);
    const std::string& isa = isas[current_seed % isas.size()];
    setenv("ONNXCOMP_ISA", isa.c_str(), 1);
    alarm(kHang);
    const auto start = std::chrono::steady_clock::now();
    Case made = MakeCase(random);
    Run(made, figures);
    if (open_statuses != 0) Give("left a status behind", made);
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    figures.slowest = std::max(figures.slowest, spent.count());
  }
  alarm(0);
  std::printf(
      "{\"instruction_sets\": %zu, \"cases\": %lld, \"valid\": %lld, \"mutated\": %lld, \"refused_at_creation\": %lld, "
      "\"refused_at_run\": %lld, \"ran\": %lld, \"slowest_s\": %.3f}\n",
      isas.size(), static_cast<long long>(count), static_cast<long long>(figures.valid),
      static_cast<long long>(figures.mutated), static_cast<long long>(figures.refused_at_creation),
      static_cast<long long>(figures.refused_at_run), static_cast<long long>(figures.ran),
      figures.slowest);
  return 0;
}
