// Codes on their way from memory: a ring of units in shared memory for each warp.
//
// A unit is 16 rows of one group of 128 weights, of one panel or two: K * 256 bytes of codes and 32
// of scales each. In memory 64 consecutive bytes are one dword of 16 rows. Copies of 16 bytes put
// dword d of four rows where lanes find the words of their rows without bank conflicts: word i of
// the run of 32 weights of row g + 8 h that lane 4 g + q decodes lies at i * 256 + h * 128 + q * 32 +
// 4 g. So no second layout of the file is needed.
#pragma once

#include "hyper/gpu_pairs.h"

namespace onnxcomp::hyper {

template <int K, int kPanels, int kStages>
struct CodeRing {
  static constexpr int kPanelBytes = K * 256;  // of codes
  static constexpr int kCodeBytes = kPanels * kPanelBytes;
  static constexpr int kUnitBytes = kCodeBytes + kPanels * 32;
  static constexpr int kBytes = kStages * kUnitBytes;  // of a warp
  static constexpr int kCopies = (kPanels * 16 * K + 31) / 32;  // of a lane
  static constexpr int kPlaces = K == 3 ? kCopies : 1;

  // What one lane reads of a unit.
  struct Words {
    uint32_t word[kPanels][2][K + 1];
    uint32_t scale[kPanels][2];  // float16
  };

  // Where copies go to and come from: byte offsets. Those of even K are equal steps apart.
  uint32_t to[kPlaces], from[kPlaces], scale_to, scale_from;
  bool copies_scale;
  uint32_t run, before, scale;  // where the lane's words lie in a unit
  char* ring;

  // `panel_step` is the distance of two panels in memory, in bytes of codes.
  ONNXCOMP_THREAD CodeRing(char* ring_in, int lane, uint32_t panel_step) : ring(ring_in) {
    ONNXCOMP_UNROLL
    for (int j = 0; j < kPlaces; ++j) {
      const int id = lane + 32 * j;
      const int panel = id / (16 * K);
      const int chunk = id % (16 * K);
      const int dword = chunk / 4;
      from[j] = static_cast<uint32_t>(panel) * panel_step + static_cast<uint32_t>(chunk) * 16u;
      to[j] = static_cast<uint32_t>(panel * kPanelBytes + dword % K * 256 + chunk % 4 / 2 * 128 +
                                    dword / K * 32 + chunk % 2 * 16);
      gpu::Pin(from[j]);
      gpu::Pin(to[j]);
    }
    scale_to = static_cast<uint32_t>(kCodeBytes + lane * 16);
    scale_from = static_cast<uint32_t>(lane / 2) * (panel_step / (K * 8)) + lane % 2 * 16u;
    copies_scale = lane < 2 * kPanels;
    gpu::Pin(scale_to);
    gpu::Pin(scale_from);
    const auto g = static_cast<uint32_t>(lane / 4);
    const auto q = static_cast<uint32_t>(lane % 4);
    run = q * 32 + g * 4;
    before = (K - 1) * 256 + (q + 3) % 4 * 32 + g * 4;
    scale = kCodeBytes + g * 2;
    gpu::Pin(run);
    gpu::Pin(before);
    gpu::Pin(scale);
  }

  // Starts to copy a unit to stage offset `stage`; of two panels the second one may not exist.
  ONNXCOMP_THREAD void Copy(uint32_t stage, const char* codes, const char* scales, bool both,
                            int lane, uint32_t panel_step) const {
    char* unit = ring + stage;
    ONNXCOMP_UNROLL
    for (int j = 0; j < kCopies; ++j) {
      const int id = lane + 32 * j;
      if (kCopies * 32 != kPanels * 16 * K && id >= kPanels * 16 * K) continue;
      if (kPanels == 2 && !both && id >= 16 * K) continue;
      if constexpr (K == 3) {
        Start(unit + to[j], codes + from[j]);
      } else if constexpr (K == 1) {  // both panels in one step
        Start(unit + to[0], codes + from[0]);
      } else {
        constexpr int kSteps = K / 2;  // of a panel
        const int panel = j / kSteps;
        const int step = j % kSteps;
        const uint32_t far = from[0] + (panel == 0 ? 0u : panel_step);
        Start(unit + to[0] + panel * kPanelBytes + step * (256 / K), codes + far + step * 512);
      }
    }
    if (copies_scale && (kPanels == 1 || both || lane < 2)) {
      Start(unit + scale_to, scales + scale_from);
    }
  }

  ONNXCOMP_THREAD void Read(uint32_t stage, Words& words) const {
    const char* unit = ring + stage;
    ONNXCOMP_UNROLL
    for (int panel = 0; panel < kPanels; ++panel) {
      ONNXCOMP_UNROLL
      for (int half = 0; half < 2; ++half) {
        const char* row = unit + panel * kPanelBytes + half * 128;
        uint32_t* word = words.word[panel][half];
        word[0] = *reinterpret_cast<const uint32_t*>(row + before);
        ONNXCOMP_UNROLL
        for (int i = 0; i < K; ++i) {
          word[i + 1] = *reinterpret_cast<const uint32_t*>(row + run + i * 256);
        }
        words.scale[panel][half] =
            *reinterpret_cast<const uint16_t*>(unit + scale + panel * 32 + half * 16);
      }
    }
  }

 private:
  static ONNXCOMP_THREAD void Start(char* shared, const char* global) {
    gpu::CopyLater(reinterpret_cast<Vector*>(shared), reinterpret_cast<const Vector*>(global));
  }
};

}  // namespace onnxcomp::hyper
