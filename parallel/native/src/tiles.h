// Eight registers of at most 16 rows of 64 bytes and the product of two of them: AMX's, or the same in plain C++
// where a test asks for it (TPD_EMULATED_TILES), so that what is built on them runs on any machine.
//
//   tiles::Configured with(rows);             for this thread: tiles 0-5 have so many rows, 6 and 7 have 16
//   zero<T>(); load<T>(p, stride); store<T>(p, stride); dot<C, A, B>();
//
// dot adds one block of bf16_order.h: C [rows][16] float32, A [rows][16 units], B [16 units][16], natural units. It
// ignores the thread's rounding and flushing. Nothing here may run before enabled() (tiles.cpp): a CPU that has these
// instructions may still fault at them, and the system has to permit them first.
#pragma once
#include <cstdint>
#include <cstring>

#include "bf16_order.h"

#if defined(TPD_EMULATED_TILES) || (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__))
#define TPD_TILES 1
#else
#define TPD_TILES 0
#endif

namespace tiles {

constexpr int kRows = 16;                     // at most
constexpr int kRowBytes = 64;

__attribute__((visibility("hidden"))) bool enabled();

#if TPD_TILES && !defined(TPD_EMULATED_TILES)

struct alignas(64) Layout {                   // what ldtilecfg reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

class Configured {
 public:
  explicit Configured(int rows) {
    Layout layout;
    for (int t = 0; t < 8; ++t) {
      layout.bytes[t] = kRowBytes;
      layout.rows[t] = static_cast<uint8_t>(t < 6 ? rows : kRows);
    }
    asm volatile("ldtilecfg %0" : : "m"(layout));
  }
  ~Configured() { asm volatile("tilerelease"); }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;
};

template <int T>
inline void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T>
inline void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }

#elif TPD_TILES

struct Registers {
  int rows[8] = {};                           // 0: not configured
  alignas(64) char bytes[8][kRows * kRowBytes];
};
inline Registers& registers() { static thread_local Registers all; return all; }
inline int rows_of(int tile) {
  const int rows = registers().rows[tile];
  if (rows == 0) __builtin_trap();            // as AMX faults
  return rows;
}

class Configured {
 public:
  explicit Configured(int rows) {
    for (int t = 0; t < 8; ++t) registers().rows[t] = t < 6 ? rows : kRows;
    std::memset(registers().bytes, 0, sizeof registers().bytes);
  }
  ~Configured() { std::memset(registers().rows, 0, sizeof registers().rows); }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;
};

template <int T>
inline void zero() { std::memset(registers().bytes[T], 0, rows_of(T) * kRowBytes); }
template <int T>
inline void load(const void* p, int64_t stride) {
  for (int r = 0; r < rows_of(T); ++r)
    std::memcpy(registers().bytes[T] + r * kRowBytes, static_cast<const char*>(p) + r * stride, kRowBytes);
}
template <int T>
inline void store(void* p, int64_t stride) {
  for (int r = 0; r < rows_of(T); ++r)
    std::memcpy(static_cast<char*>(p) + r * stride, registers().bytes[T] + r * kRowBytes, kRowBytes);
}
template <int C, int A, int B>
inline void dot() {
  using namespace bf16_order;
  const Flushing flushing;
  for (int r = 0; r < rows_of(C); ++r) {
    char* sums = registers().bytes[C] + r * kRowBytes;
    f32x16 c, e{}, o{};
    for (int u = 0; u < kUnits; ++u) {
      uint32_t unit;
      u32x16 columns;
      std::memcpy(&unit, registers().bytes[A] + r * kRowBytes + 4 * u, 4);
      std::memcpy(&columns, registers().bytes[B] + u * kRowBytes, 64);
      const u32x16 row = unit + u32x16{};
      e = fma(even(row), even(columns), e);
      o = fma(odd(row), odd(columns), o);
    }
    std::memcpy(&c, sums, 64);
    c = c + (e + o);
    settle(c);
    std::memcpy(sums, &c, 64);
  }
}

#endif

}  // namespace tiles
