// Whether AMX's tiles may be used in this process (tiles.h): one product is tried in a child of its own, which may fault
// or hang, then the system is asked for its permission. Decided once; children by fork inherit it.
#include "tiles.h"

#include <atomic>
#include <cstdio>
#include <mutex>

#if TPD_TILES && !defined(TPD_EMULATED_TILES)
#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#endif

namespace tiles {
namespace {

std::atomic<bool> on{false};

#if TPD_TILES
// One block of 16 rows and columns, denormals and zeros among it, against the order computed without tiles.
__attribute__((noinline)) bool right() {
  using namespace bf16_order;
  alignas(64) uint32_t a[16][16], b[16][16];
  alignas(64) float c[16][16], want[16][16];
  uint32_t state = 1;
  const auto draw = [&] {                     // any signs and mantissas, exponents of 2^-8 to 2^7, or those of denormals
    state = state * 1664525u + 1013904223u;
    const uint32_t exponent = state % 11 == 0 ? 0 : 119 + (state >> 24) % 16;
    return (state >> 8 & 0x807fu) | exponent << 7;
  };
  for (int r = 0; r < 16; ++r)
    for (int u = 0; u < 16; ++u) a[r][u] = draw() | draw() << 16, b[r][u] = draw() | draw() << 16, want[r][u] = 0;
  {
    const Configured configured(kRows);
    zero<0>(), load<4>(a, 64), load<6>(b, 64), dot<0, 4, 6>(), dot<0, 4, 6>(), store<0>(c, 64);
  }
  const Flushing flushing;
  for (int again = 0; again < 2; ++again)
    for (int r = 0; r < 16; ++r) {
      f32x16 sum, e{}, o{};
      for (int u = 0; u < 16; ++u) {
        u32x16 columns;
        std::memcpy(&columns, b[u], 64);
        const u32x16 row = a[r][u] + u32x16{};
        e = fma(even(row), even(columns), e), o = fma(odd(row), odd(columns), o);
      }
      std::memcpy(&sum, want[r], 64);
      sum = sum + (e + o);
      settle(sum);
      std::memcpy(want[r], &sum, 64);
    }
  return std::memcmp(c, want, sizeof c) == 0;
}
#endif

#if TPD_TILES && !defined(TPD_EMULATED_TILES)
constexpr long kRequest = 0x1023, kTileData = 18;          // ARCH_REQ_XCOMP_PERM, and the state that it is for
constexpr int kTrialMs = 2000;
enum Outcome { kRight, kWrong, kRefused };

// An error's number, or 0.
long request() { return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : errno; }

[[noreturn]] void child() {
  for (int fault : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGSYS, SIGTRAP}) signal(fault, SIG_DFL);
  prctl(PR_SET_DUMPABLE, 0);                               // no core file of a fault that is expected
  const int outcome = request() ? kRefused : right() ? kRight : kWrong;
  for (;;) syscall(SYS_exit_group, outcome);
}

// By the bare system call: nobody's fork handlers run, and nobody who waits for any child of this process meets it.
bool tried(char* reason, size_t size) {
  const long pid = syscall(SYS_clone, 0, nullptr, nullptr, nullptr, nullptr);
  if (pid == 0) child();
  if (pid < 0) return std::snprintf(reason, size, "no process for the trial product: error %d", errno), false;
  const timespec pause{0, 200000};
  int status = 0;
  for (int waited = 0;; ++waited) {
    const pid_t ended = waitpid(static_cast<pid_t>(pid), &status, WNOHANG | __WALL);
    if (ended == pid) break;
    if (ended < 0 && errno != EINTR) return std::snprintf(reason, size, "the trial product was lost: error %d", errno), false;
    if (waited == kTrialMs * 5) {
      kill(static_cast<pid_t>(pid), SIGKILL);
      while (waitpid(static_cast<pid_t>(pid), &status, __WALL) < 0 && errno == EINTR) {}
      return std::snprintf(reason, size, "the trial product took more than %d ms", kTrialMs), false;
    }
    nanosleep(&pause, nullptr);
  }
  if (WIFSIGNALED(status)) std::snprintf(reason, size, "the trial product ended with signal %d", WTERMSIG(status));
  else if (WEXITSTATUS(status) == kWrong) std::snprintf(reason, size, "the trial product had wrong bits");
  else if (WEXITSTATUS(status) == kRefused) std::snprintf(reason, size, "the system does not permit it (arch_prctl)");
  else return true;
  return false;
}

bool allowed(char* reason, size_t size) {
  if (!tried(reason, size)) return false;
  if (const long error = request())
    return std::snprintf(reason, size, "the system does not permit it: arch_prctl gives error %ld%s", error,
                         error == ENOSPC ? ", a thread's alternate signal stack is too small" : ""), false;
  return true;
}
#elif TPD_TILES
bool allowed(char* reason, size_t size) {
  return right() || (std::snprintf(reason, size, "the emulated product had wrong bits"), false);
}
#else
bool allowed(char* reason, size_t size) {
  std::snprintf(reason, size, "the compiler does not know it, or not that this CPU has it");
  return false;
}
#endif

}  // namespace

bool enabled() { return on.load(std::memory_order_relaxed); }

}  // namespace tiles

extern "C" {

// 1: from now on bfloat16 products use tiles; else 0, with the reason.
int tiles_enable(char* reason, int64_t size) {
  static std::mutex one;
  std::lock_guard<std::mutex> lock(one);
  if (!tiles::on) tiles::on = tiles::allowed(reason, static_cast<size_t>(size));
  return tiles::on;
}
}
