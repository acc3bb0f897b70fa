// Runs a model with the operator library in the ONNX Runtime of another system, for try_wheels.py.
//
//   try_session RUNTIME LIBRARY MODEL
//
// Gives ones (1 x 64, int64) to a model with one input and prints the numbers of its one output. Uses
// the C interface of ONNX Runtime by the places of its functions in the table.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace {

struct OrtApiBase {
  void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

void* const* table = nullptr;

// Calls the function at a place, with the types of its arguments; ends the program if it fails.
template <int kPlace, class... A>
void Call(A... arguments) {
  if (void* status = reinterpret_cast<void* (*)(A...)>(table[kPlace])(arguments...)) {
    std::fprintf(stderr, "%s\n", reinterpret_cast<const char* (*)(void*)>(table[2])(status));
    std::exit(1);
  }
}

constexpr int kCreateEnv = 3, kFromArray = 8, kRun = 9, kCreateOptions = 10, kThreads = 24;
constexpr int kRegister = 29, kInputName = 36, kOutputName = 37, kTensor = 49, kData = 51;
constexpr int kCount = 64, kInfo = 65, kCpuMemory = 69, kAllocator = 78, kInt64 = 7;

const OrtApiBase* Load(const char* path) {
#ifdef _WIN32
  HMODULE runtime = LoadLibraryA(path);
  void* found = runtime ? reinterpret_cast<void*>(GetProcAddress(runtime, "OrtGetApiBase")) : nullptr;
#else
  void* runtime = dlopen(path, RTLD_NOW);
  void* found = runtime ? dlsym(runtime, "OrtGetApiBase") : nullptr;
#endif
  if (found == nullptr) {
    std::fprintf(stderr, "cannot load %s\n", path);
    std::exit(1);
  }
  return reinterpret_cast<const OrtApiBase* (*)()>(found)();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const OrtApiBase* base = Load(argv[1]);
  table = base->GetApi(18);
  std::fprintf(stderr, "ONNX Runtime %s\n", base->GetVersionString());
  std::ifstream file(argv[3], std::ios::binary);
  const std::string model((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());

  void *environment = nullptr, *options = nullptr, *handle = nullptr, *session = nullptr;
  void *allocator = nullptr, *memory = nullptr, *input = nullptr, *output = nullptr;
  char *given = nullptr, *wanted = nullptr;
  Call<kCreateEnv>(3, "try", &environment);
  Call<kCreateOptions>(&options);
  Call<kThreads>(options, 1);
  Call<kRegister>(options, argv[2], &handle);
  Call<kFromArray>(environment, static_cast<const void*>(model.data()), model.size(), options,
                   &session);
  Call<kAllocator>(&allocator);
  Call<kInputName>(session, size_t{0}, allocator, &given);
  Call<kOutputName>(session, size_t{0}, allocator, &wanted);
  Call<kCpuMemory>(1, 0, &memory);
  std::vector<int64_t> ones(64, 1);
  const int64_t dims[] = {1, 64};
  Call<kTensor>(memory, static_cast<void*>(ones.data()), sizeof(int64_t) * 64, dims, size_t{2},
                kInt64, &input);
  Call<kRun>(session, static_cast<void*>(nullptr), &given, &input, size_t{1}, &wanted, size_t{1},
             &output);
  void* info = nullptr;
  const float* values = nullptr;
  size_t count = 0;
  Call<kInfo>(output, &info);
  Call<kCount>(info, &count);
  Call<kData>(output, &values);
  for (size_t i = 0; i < count; ++i) std::printf("%.9g\n", static_cast<double>(values[i]));
  std::fflush(stdout);
  std::_Exit(0);
}
