// One block of second moments; included once per instruction set by moments.cc, behind product.h. No
// include guard on purpose.

namespace ONNXCOMP_ISA {
namespace {

class Moments {
 public:
  explicit Moments(const MomentsTask& task)
      : task_(task), left_(kBlock * kStride), right_(kBlock * kDepth), part_(kPanels * kBlock * kLanes) {}

  bool ok() const { return left_.get() && right_.get() && part_.get(); }

  bool run(int64_t job) {
    const int64_t row = task_.first + job / task_.across() * kBlock;
    const int64_t column = job % task_.across() * kBlock;
    if (task_.lower && column > row) return true;
    const int rows = int(std::min<int64_t>(kBlock, task_.last - row));
    const int columns = int(std::min<int64_t>(kBlock, task_.columns - column));
    for (int64_t first = 0; first < task_.count; first += kDepth) {
      const int depth = int(std::min<int64_t>(kDepth, task_.count - first));
      read_left(first, depth, row, rows);
      read_right(first, depth, column, columns);
      int start = 0;
      for (; start + (kPanels - 1) * kLanes < columns; start += kPanels * kLanes)
        add<kPanels>(row, rows, depth, column, start, columns);
      for (; start < columns; start += kLanes) add<1>(row, rows, depth, column, start, columns);
    }
    return true;
  }

 private:
  // Panels of sixteen columns that are worked on together: their sums are kept in registers.
  static constexpr int kPanels = kWidest == 16 ? 3 : 1;
  // Distance of rows, no power of two: those would share a few places of a cache.
  static constexpr int kStride = kDepth + 16;

  // Rows that are worked on together.
  static constexpr int kRows = kWidest == 8 ? 6 : kTile;

  // [row][t], sixteen rows at a time; those that are worked on with the last one are zeros.
  void read_left(int64_t first, int depth, int64_t row, int rows) {
    const int end = std::min(kBlock, (rows + kRows - 1) / kRows * kRows);
    for (int start = 0; start < end; start += kLanes) {
      const int used = std::min(kLanes, rows - start);
      float* to = left_.get() + start * kStride;
      for (int t = 0; t < depth; ++t) {
        const float* vector = task_.a + (first + t) * task_.rows + row + start;
        for (int r = 0; r < kLanes; ++r) to[r * kStride + t] = r < used ? vector[r] : 0.0f;
      }
    }
  }

  // [columns / 16][t][lane]
  void read_right(int64_t first, int depth, int64_t column, int columns) {
    for (int start = 0; start < columns; start += kLanes) {
      const int used = std::min(kLanes, columns - start);
      float* to = right_.get() + start * kDepth;
      for (int t = 0; t < depth; ++t, to += kLanes) {
        const float* vector = task_.b + (first + t) * task_.columns + column + start;
        if (used < kLanes) std::fill(to, to + kLanes, 0.0f);
        std::memcpy(to, vector, sizeof(float) * size_t(used));
      }
    }
  }

  // Some panels, the last of which may be cut off.
  template <int Panels>
  void add(int64_t row, int rows, int depth, int64_t column, int start, int columns) {
    float* part = part_.get();
    for (int r = 0; r < rows; r += kRows)
      multiply_rows<kRows, Panels>(left_.get() + r * kStride, kStride, depth,
                                   right_.get() + start * kDepth, part + r * kLanes,
                                   kLanes * kDepth, kBlock * kLanes);
    for (int r = 0; r < rows; ++r)
      for (int panel = 0; panel < Panels; ++panel) {
        const int first = start + panel * kLanes, lanes = std::min(kLanes, columns - first);
        double* sum = task_.sum + (row + r) * task_.columns + column + first;
        const float* more = part + (panel * kBlock + r) * kLanes;
        for (int lane = 0; lane < lanes; ++lane) sum[lane] += more[lane];
      }
  }

  const MomentsTask& task_;
  Aligned<float> left_, right_, part_;
};

}  // namespace
}  // namespace ONNXCOMP_ISA
