// Sessions of one model in one process in C++, for bench_sessions.py.
//
//   sessions MODEL LIBRARY plain|threads|FILE COUNT
//
// `threads`: each session has a thread of its own, as an instance of Triton's backend has. FILE names
// the data file and lists its tensors, `name type offset length rank dims`: they are given to all
// sessions by AddInitializer. Uses the C interface of ONNX Runtime by the places of its functions in the table.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

struct OrtApiBase {
  void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};
extern "C" const OrtApiBase* OrtGetApiBase();

namespace {

void* const* table = OrtGetApiBase()->GetApi(18);

template <class F>
F* At(int place) {
  return reinterpret_cast<F*>(table[place]);
}

// Calls the function at a place, with the types of its arguments; ends the program if it fails.
template <int kPlace, class... A>
void Call(A... arguments) {
  if (void* status = At<void*(A...)>(kPlace)(arguments...)) {
    std::fprintf(stderr, "%s\n", At<const char*(const void*)>(2)(status));
    std::exit(1);
  }
}

constexpr int kCreateEnv = 3, kCreateSession = 7, kRun = 9, kCreateOptions = 10, kThreads = 24;
constexpr int kRegister = 29, kInputs = 30, kOutputs = 31, kInputType = 33, kInputName = 36;
constexpr int kOutputName = 37, kTensor = 49, kTensorInfo = 55, kElementType = 60, kRank = 61;
constexpr int kDims = 62, kCpuMemory = 69, kAllocator = 78, kAddInitializer = 150;
constexpr int kFloat = 1;

void* Environment() {
  static void* made = [] {
    void* environment = nullptr;
    Call<kCreateEnv>(3, "sessions", &environment);
    return environment;
  }();
  return made;
}

void* Memory() {
  static void* made = [] {
    void* memory = nullptr;
    Call<kCpuMemory>(1, 0, &memory);
    return memory;
  }();
  return made;
}

void* Tensor(void* data, size_t bytes, const std::vector<int64_t>& dims, int type) {
  void* value = nullptr;
  Call<kTensor>(static_cast<const void*>(Memory()), data, bytes, dims.data(), dims.size(), type,
                &value);
  return value;
}

struct Weight {
  std::string name;
  void* value;
};

std::vector<Weight> ReadWeights(const char* list) {
  std::ifstream in(list);
  std::string name;
  std::getline(in, name);
  const int file = open(name.c_str(), O_RDONLY);
  const auto size = static_cast<size_t>(lseek(file, 0, SEEK_END));
  auto* bytes = static_cast<char*>(mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0));
  close(file);
  std::vector<Weight> weights;
  size_t offset = 0, length = 0, rank = 0;
  for (int type = 0; in >> name >> type >> offset >> length >> rank;) {
    std::vector<int64_t> dims(rank);
    for (int64_t& dim : dims) in >> dim;
    weights.push_back({name, Tensor(bytes + offset, length, dims, type)});
  }
  return weights;
}

void* Open(const char* model, const char* library, const std::vector<Weight>& weights) {
  void* options = nullptr;
  void* handle = nullptr;
  void* session = nullptr;
  Call<kCreateOptions>(&options);
  Call<kThreads>(options, 1);
  Call<kRegister>(options, library, &handle);
  for (const Weight& weight : weights) {
    Call<kAddInitializer>(options, weight.name.c_str(), static_cast<const void*>(weight.value));
  }
  Call<kCreateSession>(Environment(), model, static_cast<const void*>(options), &session);
  return session;
}

// Ones of 1 x 16, and no past.
void* MadeUp(const void* session, size_t index, std::vector<char>& buffer) {
  void* kind = nullptr;
  const void* info = nullptr;
  int type = 0;
  size_t rank = 0;
  Call<kInputType>(session, index, &kind);
  Call<kTensorInfo>(static_cast<const void*>(kind), &info);
  Call<kElementType>(info, &type);
  Call<kRank>(info, &rank);
  std::vector<int64_t> dims(rank);
  Call<kDims>(info, dims.data(), rank);
  size_t count = 1;
  for (size_t i = 0; i < rank; ++i) {
    if (dims[i] < 0) dims[i] = 1;
    if (rank == 2 && i == 1) dims[i] = 16;
    if (rank == 4 && i == 2) dims[i] = 0;
    count *= static_cast<size_t>(dims[i]);
  }
  const size_t bytes = count * (type == kFloat ? sizeof(float) : sizeof(int64_t));
  buffer.assign(bytes + 1, 0);
  if (type != kFloat) {
    for (size_t i = 0; i < count; ++i) reinterpret_cast<int64_t*>(buffer.data())[i] = 1;
  }
  return Tensor(buffer.data(), bytes, dims, type);
}

void RunOnce(void* session) {
  void* allocator = nullptr;
  size_t inputs = 0, outputs = 0;
  const void* constant = session;
  Call<kAllocator>(&allocator);
  Call<kInputs>(constant, &inputs);
  Call<kOutputs>(constant, &outputs);
  std::vector<char*> given(inputs), wanted(outputs);
  std::vector<void*> values(inputs), results(outputs, nullptr);
  std::vector<std::vector<char>> buffers(inputs);
  for (size_t i = 0; i < inputs; ++i) {
    Call<kInputName>(constant, i, allocator, &given[i]);
    values[i] = MadeUp(constant, i, buffers[i]);
  }
  for (size_t i = 0; i < outputs; ++i) Call<kOutputName>(constant, i, allocator, &wanted[i]);
  Call<kRun>(session, static_cast<const void*>(nullptr), given.data(), values.data(), inputs,
             wanted.data(), outputs, results.data());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const std::string how = argv[3];
  const int count = std::atoi(argv[4]);
  const bool threads = how == "threads";
  std::vector<Weight> weights;
  if (!threads && how != "plain") weights = ReadWeights(argv[3]);
  std::vector<void*> sessions;
  for (int i = 0; i < count; ++i) {
    sessions.push_back(Open(argv[1], argv[2], weights));
    if (!threads) RunOnce(sessions.back());
  }
  std::vector<std::thread> instances;
  for (void* session : sessions) {
    if (threads) instances.emplace_back([session] { RunOnce(session); });
  }
  for (std::thread& instance : instances) instance.join();
  std::puts("ready");
  std::fflush(stdout);
  std::getchar();
  std::_Exit(0);
}
