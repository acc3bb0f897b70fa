// Asks processor and system for the tile units.

#include "common/amx.h"

#include "common/processor.h"
#ifndef ONNXCOMP_AMX_MODEL
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace onnxcomp::amx {

#ifdef ONNXCOMP_AMX_MODEL

bool Available() { return true; }

#else
namespace {

// Linux keeps the state of tiles, 8 KiB for each thread, from processes that do not ask for it.
// Source: Documentation/arch/x86/xstate.rst of the kernel.
bool Granted() {
  constexpr long kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;     // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

bool Available() {
  static const bool available = HasX86({X86::kAmxTile, X86::kAmxInt8}) && Granted();
  return available;
}

#endif

}  // namespace onnxcomp::amx
