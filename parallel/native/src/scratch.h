// Working memory of a thread, kept from call to call.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace gemm {

class Scratch {                               // aligned memory that grows
 public:
  ~Scratch() { std::free(p_); }
  char* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(p_);
      p_ = static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
      size_ = p_ ? bytes : 0;
    }
    return p_;
  }
  void trim(int64_t keep) {
    if (size_ > keep) { std::free(p_); p_ = nullptr; size_ = 0; }
  }

 private:
  char* p_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace gemm
