// Switches between stacks: what the emulator's threads are made of.
#pragma once

// Saves the callee's registers on the stack that it leaves, and takes those of the other.
extern "C" __attribute__((visibility("hidden"))) void onnxcomp_emulator_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.hidden onnxcomp_emulator_switch
.globl onnxcomp_emulator_switch
.type onnxcomp_emulator_switch, @function
onnxcomp_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size onnxcomp_emulator_switch, . - onnxcomp_emulator_switch
)");
constexpr int kSaved = 6;  // words below the address to return to
constexpr int kAbove = 1;  // words above it, so that functions find the stack aligned
#elif defined(__aarch64__)
asm(R"(
.text
.hidden onnxcomp_emulator_switch
.globl onnxcomp_emulator_switch
.type onnxcomp_emulator_switch, @function
onnxcomp_emulator_switch:
  stp d8, d9, [sp, #-160]!
  stp d10, d11, [sp, #16]
  stp d12, d13, [sp, #32]
  stp d14, d15, [sp, #48]
  stp x19, x20, [sp, #64]
  stp x21, x22, [sp, #80]
  stp x23, x24, [sp, #96]
  stp x25, x26, [sp, #112]
  stp x27, x28, [sp, #128]
  stp x29, x30, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x29, x30, [sp, #144]
  ldp x27, x28, [sp, #128]
  ldp x25, x26, [sp, #112]
  ldp x23, x24, [sp, #96]
  ldp x21, x22, [sp, #80]
  ldp x19, x20, [sp, #64]
  ldp d14, d15, [sp, #48]
  ldp d12, d13, [sp, #32]
  ldp d10, d11, [sp, #16]
  ldp d8, d9, [sp], #160
  ret
.size onnxcomp_emulator_switch, . - onnxcomp_emulator_switch
)");
constexpr int kSaved = 19;
constexpr int kAbove = 0;
#else
#error "the emulator switches stacks on x86-64 and 64-bit ARM only"
#endif
