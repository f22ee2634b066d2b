// Copies of matrices into the layouts gemm.cpp streams (gemm_pack.h), 16 x 16 units at a time.
#include "gemm_pack.h"

#include <algorithm>

#include "operands.h"
#include "pool.h"
#include "simd.h"

namespace gemm {
namespace {

using simd::bf16;
using simd::u16x16;
using simd::u32x16;

constexpr int64_t kLarge = 4 << 20;           // bytes that do not stay in the caches
constexpr int64_t kAcross = 16;               // units of K that are packed across all panels before the next ones
constexpr int64_t kAhead = 128;               // units that the reads of a panel look ahead along its 64 rows

struct Block { u32x16 v[16]; };               // 16 vectors of 16 units

// Units of W, [units][columns], from their natural order into the stored one and back.
template <class E>
void stored_order(Block& block) {
  if (!kPaired || sizeof(E) == 4) return;
  const Block in = block;
  for (int p = 0; p < bf16_order::kChain; ++p) {
    block.v[p] = bf16_order::even_pair(in.v[2 * p], in.v[2 * p + 1]);
    block.v[bf16_order::kChain + p] = bf16_order::odd_pair(in.v[2 * p], in.v[2 * p + 1]);
  }
}
template <class E>
void natural_order(Block& block) {
  if (!kPaired || sizeof(E) == 4) return;
  const Block in = block;
  for (int p = 0; p < bf16_order::kChain; ++p) {
    const u32x16 even = in.v[p], odd = in.v[bf16_order::kChain + p];
    block.v[2 * p] = even >> 16 | (odd & 0xffff0000u);
    block.v[2 * p + 1] = (even & 0xffffu) | odd << 16;
  }
}

#ifdef __AVX512F__
Block transposed(const Block& in) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = (__m512i)in.v[i];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
    }
  Block out;
  for (int j = 0; j < 8; ++j) {
    out.v[j] = (u32x16)_mm512_shuffle_i32x4(b[j], b[j + 8], 0x88);
    out.v[j + 8] = (u32x16)_mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd);
  }
  return out;
}
#else
Block transposed(const Block& in) {
  Block out;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out.v[j][i] = in.v[i][j];
  return out;
}
#endif

inline u32x16 along_row(const float* p, int64_t elements) {
  return simd::float_to_bits(simd::load(p, static_cast<int>(std::min<int64_t>(elements, 16))));
}
inline u32x16 along_row(const bf16* p, int64_t elements) {
#ifdef __AVX512BW__
  uint32_t mask = elements >= 32 ? ~0u : (1u << elements) - 1;
  return (u32x16)_mm512_maskz_loadu_epi16(mask, p);
#else
  bf16 pairs[32] = {};
  std::memcpy(pairs, p, std::min<int64_t>(elements, 32) * sizeof(bf16));
  u32x16 r;
  std::memcpy(&r, pairs, sizeof r);
  return r;
#endif
}
inline u32x16 down_rows(const float* p, int64_t, int64_t, int rows) {
  return simd::float_to_bits(simd::load(p, rows));
}
inline u32x16 down_rows(const bf16* p, int64_t k_stride, int64_t elements, int rows) {
  u32x16 low = simd::float_to_bits(simd::load(p, rows)) >> 16;
  return elements < 2 ? low : low | simd::float_to_bits(simd::load(p + k_stride, rows));
}

template <class E>
struct Reader {                               // 16 x 16 units of a View, zero outside
  static constexpr int kPer = 4 / sizeof(E);  // elements of a unit
  View view;
  int64_t n_rows;
  const E* at(int64_t row, int64_t k) const {
    return reinterpret_cast<const E*>(view.base) + row * view.row_stride + k * view.k_stride;
  }
  Block natural(int64_t row, int64_t begin, int64_t end) const {
    Block block{};
    int rows = static_cast<int>(std::min<int64_t>(16, n_rows - row));
    if (view.k_stride == 1) {
      for (int i = 0; i < rows; ++i) block.v[i] = along_row(at(row + i, begin), end - begin);
    } else {
      for (int u = 0; u < 16 && begin + u * kPer < end && rows > 0; ++u)
        block.v[u] = down_rows(at(row, begin + u * kPer), view.k_stride, end - begin - u * kPer, rows);
    }
    return block;
  }
  // What a panel's next blocks will read: too many streams for the hardware to follow.
  void prefetch_rows(int64_t row, int64_t k) const {
    for (int r = 0; r < kPanel; ++r) __builtin_prefetch(at(row + r, k + kAhead * kPer), 0, 2);
  }
  Block by_rows(int64_t row, int64_t begin, int64_t end) const {
    return view.k_stride == 1 ? natural(row, begin, end) : transposed(natural(row, begin, end));
  }
  Block by_units(int64_t row, int64_t begin, int64_t end) const {
    return view.k_stride == 1 ? transposed(natural(row, begin, end)) : natural(row, begin, end);
  }
};

// Past the caches: a packed weight is read much later, and a line that is written whole need not be read first.
inline void stream(char* p, u32x16 v) {
#ifdef __AVX512F__
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#else
  std::memcpy(p, &v, sizeof v);
#endif
}
inline void fence(bool streamed) {
#ifdef __AVX512F__
  if (streamed) _mm_sfence();
#else
  (void)streamed;
#endif
}
inline void store(char* p, u32x16 v, int64_t units) {
  simd::store(reinterpret_cast<float*>(p), simd::bits_to_float(v), static_cast<int>(std::min<int64_t>(units, 16)));
}

// Units of one leaf from element k on, at most `most` of them, of one panel.
template <class E>
void pack_piece(const Reader<E>& reader, int64_t row, const Leaf& leaf, int64_t k, int64_t most, bool large, char* panel) {
  constexpr int kPer = Reader<E>::kPer;
  const int64_t stop = std::min(leaf.end, k + most * kPer);
  for (; k < stop; k += 16 * kPer) {
    const int units = kPer == 2 ? 16 : static_cast<int>(std::min<int64_t>(16, leaf.end - k));
    char* dst = panel + (leaf.unit + (k - leaf.begin) / kPer) * kPanelBytes;
    if (reader.view.k_stride == 1) reader.prefetch_rows(row, k);
    for (int group = 0; group < kPanel / 16; ++group) {
      Block block = reader.by_units(row + 16 * group, k, leaf.end);
      stored_order<E>(block);
      for (int u = 0; u < units; ++u) {
        char* p = dst + u * kPanelBytes + group * 64;
        if (large) stream(p, block.v[u]);
        else store(p, block.v[u], 16);
      }
    }
  }
}

template <class E>
void copy_block(const Reader<E>& reader, int64_t row, const Leaf& leaf, int64_t k, const RowPlace& place, char* dst) {
  constexpr int kPer = Reader<E>::kPer;
  const int rows = static_cast<int>(std::min<int64_t>(16, reader.n_rows - row));
  const int64_t unit = (k - leaf.begin) / kPer;
  if (rows <= 0) return;
  Block block = reader.by_rows(row, k, leaf.end);
  dst += row * place.row_bytes + (leaf.unit + unit) * place.unit_bytes;
  for (int i = 0; i < rows; ++i) {
    char* to = dst + i * place.row_bytes;
    if (kPer == 1) {
      store(to, block.v[i], leaf.end - leaf.begin - unit);
    } else if (place.tiles) {
      store(to, block.v[i], 16);
    } else if (kPaired) {
      store(to, bf16_order::paired(block.v[i]), 16);
    } else {
      store(to, block.v[i] << 16, 16);
      store(to + 64, block.v[i] & 0xffff0000u, 16);
    }
  }
}

// Rows of W from one panel, `rows` of them.
template <class E>
void unpack_panel(const char* panel, int64_t rows, int64_t k, const Leaf* leaves, int64_t n_leaves, E* dst) {
  constexpr int64_t kPer = 4 / sizeof(E);
  for (const Leaf* leaf = leaves; leaf != leaves + n_leaves; ++leaf)
    for (int64_t at = leaf->begin; at < leaf->end; at += 16 * kPer) {
      const int64_t elements = std::min(16 * kPer, leaf->end - at), units = kPer == 2 ? 16 : elements;
      for (int64_t row = 0; row < rows; row += 16) {
        Block block{};
        const char* from = panel + (leaf->unit + (at - leaf->begin) / kPer) * kPanelBytes + row * 4;
        for (int64_t u = 0; u < units; ++u) std::memcpy(&block.v[u], from + u * kPanelBytes, 64);
        natural_order<E>(block);
        block = transposed(block);
        for (int64_t i = 0; i < std::min<int64_t>(16, rows - row); ++i)
          std::memcpy(dst + (row + i) * k + at, &block.v[i], elements * sizeof(E));
      }
    }
}

template <class F>
void with_reader(bool half, View src, int64_t rows, const F& f) {
  half ? f(Reader<bf16>{src, rows}) : f(Reader<float>{src, rows});
}

}  // namespace

void pack_panels(bool half, View src, int64_t rows, const Leaf* leaves, int64_t n_leaves, int64_t units, char* dst) {
  const int64_t panels = (rows + kPanel - 1) / kPanel;
  const bool large = panels * units * kPanelBytes > kLarge;
  // In the order of the source's memory: panel by panel, or a few rows of it across all panels.
  const int64_t most = src.k_stride == 1 ? units : kAcross;
  with_reader(half, src, rows, [&](const auto& reader) {
    const int64_t step = most * (half ? 2 : 1);
    pool::parallel_ranges(panels, [&](int64_t begin, int64_t end) {
      const int64_t together = src.k_stride == 1 ? 1 : end - begin;
      for (; begin < end; begin += together)
        for (const Leaf* leaf = leaves; leaf != leaves + n_leaves; ++leaf)
          for (int64_t k = leaf->begin; k < leaf->end; k += step)
            for (int64_t p = begin; p < begin + together; ++p)
              pack_piece(reader, p * kPanel, *leaf, k, most, large, dst + p * units * kPanelBytes);
      fence(large);
    });
  });
}

void unpack_panels(bool half, const char* src, int64_t rows, int64_t k, const Leaf* leaves, int64_t n_leaves,
                   int64_t units, char* dst) {
  pool::parallel_for((rows + kPanel - 1) / kPanel, [&](int64_t p) {
    const char* panel = src + p * units * kPanelBytes;
    const int64_t row = p * kPanel, live = std::min<int64_t>(kPanel, rows - row);
    if (half) unpack_panel(panel, live, k, leaves, n_leaves, reinterpret_cast<bf16*>(dst) + row * k);
    else unpack_panel(panel, live, k, leaves, n_leaves, reinterpret_cast<float*>(dst) + row * k);
  });
}

void copy_rows(bool half, View src, int64_t rows, const Leaf* leaves, int64_t n_leaves, RowPlace place, char* dst) {
  constexpr int64_t kTogether = 64;           // rows: whole cache lines where the source runs down them
  with_reader(half, src, rows, [&](const auto& reader) {
    pool::parallel_for((rows + kTogether - 1) / kTogether, [&](int64_t b) {
      for (const Leaf* leaf = leaves; leaf != leaves + n_leaves; ++leaf)
        for (int64_t k = leaf->begin; k < leaf->end; k += half ? bf16_order::kBlock : 16)
          for (int64_t row = b * kTogether; row < (b + 1) * kTogether; row += 16)
            copy_block(reader, row, *leaf, k, place, dst);
    });
  });
}

}  // namespace gemm

namespace {

void check_leaves(int dtype, int64_t rows, const gemm::Leaf* leaves, int64_t n_leaves, int64_t units, const void* packed) {
  using namespace operands;
  present(packed, count((rows + gemm::kPanel - 1) / gemm::kPanel, units, gemm::kPanelBytes), 64);
  present(leaves, n_leaves);
  for (const gemm::Leaf* leaf = leaves; leaf != leaves + n_leaves; ++leaf)
    require(0 <= leaf->begin && leaf->begin <= leaf->end && 0 <= leaf->unit &&
            leaf->unit + gemm::units_of(*leaf, dtype == kBFloat16) <= units, kBadIndex);
}

}  // namespace

extern "C" {

int gemm_pack(int dtype, const void* src, int64_t row_stride, int64_t k_stride, int64_t rows, const gemm::Leaf* leaves,
              int64_t n_leaves, int64_t units, void* dst) {
  using namespace operands;
  return guarded([&] {
    present(src, rows, element_size(dtype));
    require(k_stride == 1 || row_stride == 1, kBadSize);
    check_leaves(dtype, rows, leaves, n_leaves, units, dst);
    gemm::pack_panels(dtype == kBFloat16, {static_cast<const char*>(src), row_stride, k_stride}, rows, leaves, n_leaves,
                      units, static_cast<char*>(dst));
  });
}

// The matrix [rows, k] that gemm_pack was given, contiguous in dst.
int gemm_unpack(int dtype, const void* packed, int64_t rows, int64_t k, const gemm::Leaf* leaves, int64_t n_leaves,
                int64_t units, void* dst) {
  using namespace operands;
  return guarded([&] {
    present(dst, count(rows, k), element_size(dtype));
    check_leaves(dtype, rows, leaves, n_leaves, units, packed);
    for (const gemm::Leaf* leaf = leaves; leaf != leaves + n_leaves; ++leaf) require(leaf->end <= k, kBadIndex);
    gemm::unpack_panels(dtype == kBFloat16, static_cast<const char*>(packed), rows, k, leaves, n_leaves, units,
                        static_cast<char*>(dst));
  });
}
}
