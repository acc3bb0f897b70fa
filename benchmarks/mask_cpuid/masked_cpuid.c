// Answers `cpuid` for code in which masked.py replaced the instruction: without AVX-512, AVX-VNNI and AMX.
//
// Preloaded. The replacement, 37 A2, is an invalid instruction in 64-bit mode that no compiler writes, so a trap
// (ud2) of the program itself stays one. With MASKED_CPUID_SAMPLES=FILE the places that run are sampled a thousand
// times a second of processor time; FILE gets a line "path offset" for each sample when the process ends.
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <ucontext.h>

enum { kMaxSamples = 1 << 20 };

// Bits to clear, by leaf and subleaf: Intel SDM, volume 2A, table 3-8.
static const unsigned kAvx512Ebx = 1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31;
static const unsigned kAvx512Ecx = 1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14;
static const unsigned kAvx512Edx = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 23;
static const unsigned kAmxEdx = 1u << 22 | 1u << 24 | 1u << 25;
static const unsigned kVnniEax = 1u << 4 | 1u << 5 | 1u << 21 | 1u << 23;
static const unsigned kVnniEdx = 1u << 4 | 1u << 5 | 1u << 8 | 1u << 10 | 1u << 19;

static void* samples[kMaxSamples];
static atomic_size_t sample_count;

static void MaskedCpuid(greg_t* registers) {
  const unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX];
  unsigned a, b, c, d;
  __cpuid_count(leaf, subleaf, a, b, c, d);
  if (leaf == 7 && subleaf == 0) {
    b &= ~kAvx512Ebx;
    c &= ~kAvx512Ecx;
    d &= ~(kAvx512Edx | kAmxEdx);
  } else if (leaf == 7 && subleaf == 1) {
    a &= ~kVnniEax;
    d &= ~kVnniEdx;
  } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {  // tiles, AVX10
    a = b = c = d = 0;
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
}

static void OnIllegal(int number, siginfo_t* info, void* context) {
  (void)info;
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned char* at = (const unsigned char*)registers[REG_RIP];
  if (at[0] != 0x37 || at[1] != 0xa2) {
    signal(number, SIG_DFL);  // the instruction runs again and ends the process
    return;
  }
  MaskedCpuid(registers);
  registers[REG_RIP] += 2;
}

static void OnTick(int number, siginfo_t* info, void* context) {
  (void)number;
  (void)info;
  const size_t index = atomic_fetch_add(&sample_count, 1);
  if (index < kMaxSamples) samples[index] = (void*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
}

static void Handle(int number, void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigaction(number, &action, NULL);
}

__attribute__((constructor)) static void Start(void) {
  Handle(SIGILL, OnIllegal);
  if (getenv("MASKED_CPUID_SAMPLES") == NULL) return;
  Handle(SIGPROF, OnTick);
  const struct itimerval millisecond = {{0, 1000}, {0, 1000}};
  setitimer(ITIMER_PROF, &millisecond, NULL);
}

__attribute__((destructor)) static void Finish(void) {
  const char* path = getenv("MASKED_CPUID_SAMPLES");
  if (path == NULL) return;
  const struct itimerval never = {{0, 0}, {0, 0}};
  setitimer(ITIMER_PROF, &never, NULL);
  FILE* file = fopen(path, "a");
  if (file == NULL) return;
  const size_t taken = atomic_load(&sample_count);
  for (size_t i = 0; i < taken && i < kMaxSamples; ++i) {
    Dl_info about;
    if (dladdr(samples[i], &about) == 0 || about.dli_fname == NULL) continue;
    fprintf(file, "%s %zx\n", about.dli_fname, (size_t)((char*)samples[i] - (char*)about.dli_fbase));
  }
  fclose(file);
}
