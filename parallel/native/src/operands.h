// What every entry of the library asks of its operands before it touches them, and how it answers.
//
// Python's check (operands.py) knows the tensors and says in words what is wrong; this one does not trust it. An entry is
// `return operands::guarded([&] { ... })`: whatever is thrown in it, in the caller or in a thread of the pool, becomes a
// status, so that neither an odd operand nor a lack of memory ends the process.
#pragma once
#include <cstdint>
#include <new>
#include <stdexcept>

#include "simd.h"

namespace operands {

enum DType : int { kFloat32 = 1, kBFloat16 = 2 };                        // mirrored by DType of operands.py; 0 is no type
enum Status : int { kOk, kNoMemory, kBadType, kBadSize, kNoData, kMisaligned, kBadIndex, kUnknown,
                    kStale };                                            // by Status and REASONS

struct Refused { Status status; };

inline void require(bool holds, Status otherwise) {
  if (!holds) throw Refused{otherwise};
}

template <class F>
int guarded(const F& f) noexcept {
  try {
    f();
    return kOk;
  } catch (const Refused& refused) {
    return refused.status;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const std::length_error&) {        // of a vector
    return kNoMemory;
  } catch (...) {
    return kUnknown;
  }
}

// f(E{}) with the element type of a DType.
template <class F>
void typed(int dtype, const F& f) {
  switch (dtype) {
    case kFloat32: return f(float{});
    case kBFloat16: return f(simd::bf16{});
    default: throw Refused{kBadType};
  }
}

inline int64_t element_size(int dtype) {
  require(dtype == kFloat32 || dtype == kBFloat16, kBadType);
  return dtype == kFloat32 ? 4 : 2;
}

// The product of the sizes; none is negative and, in elements of at most eight bytes, all fit the address space.
template <class... Sizes>
int64_t count(Sizes... sizes) {
  int64_t total = 1, bytes = 0;
  for (int64_t size : {int64_t(sizes)...})
    require(size >= 0 && !__builtin_mul_overflow(total, size, &total), kBadSize);
  require(!__builtin_mul_overflow(total, int64_t(8), &bytes), kBadSize);
  return total;
}

// n elements of T at p (or nothing at all, where null is allowed).
inline void present(const void* p, int64_t n, int64_t alignment) {
  require(n >= 0, kBadSize);
  require(n == 0 || p != nullptr, kNoData);
  require(reinterpret_cast<uintptr_t>(p) % alignment == 0, kMisaligned);
}
template <class T>
void present(const T* p, int64_t n) { present(p, n, alignof(T)); }
template <class T>
void optional(const T* p) { require(reinterpret_cast<uintptr_t>(p) % alignof(T) == 0, kMisaligned); }

// Borders of leaves: they ascend from at least 0 to at most `end`.
inline void ascending(const int64_t* borders, int64_t n_leaves, int64_t end) {
  require(n_leaves >= 0, kBadSize);
  present(borders, n_leaves + 1);
  require(borders[0] >= 0 && borders[n_leaves] <= end, kBadIndex);
  for (int64_t i = 0; i < n_leaves; ++i) require(borders[i] <= borders[i + 1], kBadIndex);
}

}  // namespace operands
