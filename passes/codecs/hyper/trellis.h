// The trellises that there are code for: bits of a symbol and of a state.

#pragma once

#define ONNXCOMP_EACH_TRELLIS(CASE)                                                          \
  CASE(1, 6) CASE(2, 6) CASE(3, 6) CASE(4, 6)                                                \
  CASE(1, 7) CASE(2, 7) CASE(3, 7) CASE(4, 7) CASE(5, 7)                                     \
  CASE(1, 8) CASE(2, 8) CASE(3, 8) CASE(4, 8) CASE(5, 8) CASE(6, 8)                          \
  CASE(1, 10) CASE(2, 10) CASE(3, 10) CASE(4, 10) CASE(5, 10) CASE(6, 10)                    \
  CASE(1, 12) CASE(2, 12) CASE(3, 12) CASE(4, 12) CASE(5, 12) CASE(6, 12)
