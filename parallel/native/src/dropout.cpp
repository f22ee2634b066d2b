// Dropout of the rows of a matrix; the masks are those of dropout.h.
#include "dropout.h"

#include <algorithm>

#include "operands.h"
#include "pool.h"

namespace {

template <class T>
void apply(int64_t rows, int64_t width, const T* x, const uint64_t* keys, int64_t first, dropout::Chance chance, T* y) {
  pool::parallel_for(rows, [&](int64_t r) {
    for (int64_t c = 0; c < width; c += simd::kLanes) {
      const int live = int(std::min<int64_t>(simd::kLanes, width - c));
      const int64_t at = r * width + c;
      simd::store(y + at, simd::load(x + at, live) * dropout::factors(chance, keys[r], uint32_t(first + c)), live);
    }
  });
}

}  // namespace

// y[r][c] = x[r][c] times 0 or the scale, by keys[r] and column first + c; contiguous
extern "C" int dropout_rows(int dtype, int64_t rows, int64_t width, const void* x, const uint64_t* keys, int64_t first,
                            dropout::Chance chance, void* y) {
  return operands::guarded([&] {
    operands::present(keys, rows);
    operands::typed(dtype, [&](auto e) {
      using T = decltype(e);
      auto* from = static_cast<const T*>(x);
      auto* to = static_cast<T*>(y);
      operands::present(from, operands::count(rows, width)), operands::present(to, rows * width);
      apply(rows, width, from, keys, first, chance, to);
    });
  });
}
