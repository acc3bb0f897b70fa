// How far ahead x86 processors are asked for codes.
//
// Internal linkage throughout: translation units with different instruction sets include this.
#pragma once

#include "hyper/format.h"

namespace onnxcomp::hyper {
namespace {

// Distance in lines: more than a page, so that address translation is under way in time.
constexpr int kAhead = 96;

// How far ahead, in bytes, the codes lie that follow kAhead lines later when panels are read in
// pairs, group by group: past the end of a panel comes the panel after the next.
inline int64_t PairAhead(const Format& format, int64_t g) {
  const int64_t block = static_cast<int64_t>(format.dwords) * kLine;
  const int64_t groups = (kAhead * kLine + block - 1) / block;
  const int64_t ahead = groups < format.groups ? groups : format.groups;
  return (ahead + (g + ahead < format.groups ? 0 : format.groups)) * block;
}

}  // namespace
}  // namespace onnxcomp::hyper
