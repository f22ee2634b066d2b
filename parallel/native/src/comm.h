// Rounds, flags and waiting: what the collectives (comm.cpp, all_reduce.cpp) between the ranks of one host through a shared mapping.
//
//   [Line per rank][ring of broadcast chunks][slots: 2 parities x ranks x cap bytes]
//
// A collective is one or more rounds. In a round a rank writes its slot, publishes its flag (kind, byte count and call
// number travel in the flag's cache line and are compared), waits for every peer's flag and reads their slots. Two
// parities are enough: a rank that starts round n+2 has seen every flag of n+1, set only after its owner had read round
// n. Sums run in a fixed order, so all ranks get the same bits; large ones are divided among the ranks (`split`).
// broadcast_bytes has its own ring, so that rank 0 does not wait for readers. Waiting: spin, yield, then a futex.
#pragma once
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include "pool.h"

namespace comm {

enum Status { kOk = 0, kTimeout = 1, kDied = 2, kLeft = 3, kMismatch = 4, kNoMemory = 5 };
enum State : uint32_t { kAbsent = 0, kPresent = 1, kClosed = 2, kFailed = 3 };
constexpr uint64_t kRing = 8, kRingBytes = 32768;
constexpr int64_t kDozeNs = 50'000'000;

struct Flag {
  std::atomic<uint64_t> value;
  std::atomic<uint32_t> sleepers;
};
struct Head {
  uint32_t kind, tag;
  uint64_t nbytes, call;
};
struct alignas(128) Line {
  Flag arrived;                               // rounds this rank has published
  Head head[2];
  Flag taken;                                 // chunks of the ring this rank has read
  std::atomic<uint32_t> state;
  std::atomic<uint32_t> blame;                // why it failed: status << 16 | rank
  std::atomic<uint64_t> waiting;              // what it sleeps in: call << 8 | kind; 0: nothing
  int32_t pid;
};
struct alignas(128) Chunk {
  uint64_t total, call, nbytes;
  alignas(64) char data[kRingBytes];
};
struct alignas(128) Ring {
  Flag sent;
  Chunk chunk[kRing];
};
static_assert(offsetof(Line, taken) == 64, "a flag and its heads share one cache line");

struct Comm {
  char* base;
  int rank, size;
  uint64_t cap;
  int64_t spin_ns, yield_ns, limit_ns;
  uint64_t round = 0, ring = 0;
  uint64_t current = 0;                        // call << 8 | kind
  int culprit = -1;
  std::vector<int> pidfd;
  std::vector<const char*> node;               // working room of the sums
  std::vector<float> scratch;
  std::vector<char> saved;

  Line& line(int r) { return reinterpret_cast<Line*>(base)[r]; }
  Ring& commands() { return *reinterpret_cast<Ring*>(base + size * sizeof(Line)); }
  char* slot(uint64_t at, int r) {
    return base + size * sizeof(Line) + sizeof(Ring) + ((at & 1) * size + r) * cap;
  }
};

inline int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

// --- waiting

inline void doze(Flag& flag, uint64_t target, int64_t ns) {
#ifdef __linux__
  flag.sleepers.fetch_add(1, std::memory_order_seq_cst);
  uint64_t seen = flag.value.load(std::memory_order_seq_cst);
  timespec limit{ns / 1'000'000'000, ns % 1'000'000'000};
  if (seen < target) syscall(SYS_futex, &flag.value, FUTEX_WAIT, static_cast<uint32_t>(seen), &limit, nullptr, 0);
  flag.sleepers.fetch_sub(1, std::memory_order_seq_cst);
#else
  timespec nap{0, 50'000};
  nanosleep(&nap, nullptr);
#endif
}

inline void wake(Flag& flag) {
#ifdef __linux__
  if (flag.sleepers.load(std::memory_order_seq_cst)) syscall(SYS_futex, &flag.value, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

inline void publish(Flag& flag, uint64_t value) {
  flag.value.store(value, std::memory_order_seq_cst);       // before the sleepers are counted
  wake(flag);
}

inline bool is_dead(Comm* c, int r) {
  if (c->pidfd.empty()) return false;
  if (c->pidfd[r] >= 0) {                                   // readable once the process has ended, reaped or not
    pollfd p{c->pidfd[r], POLLIN, 0};
    return poll(&p, 1, 0) == 1;
  }
  return kill(c->line(r).pid, 0) != 0 && errno == ESRCH;
}

// Why waiting for `owner` is in vain, if it is: somebody is gone, or the owner sleeps in another collective.
inline Status look_around(Comm* c, int owner) {
  for (int r = 0; r < c->size; ++r) {
    if (r == c->rank) continue;
    uint32_t state = c->line(r).state.load(std::memory_order_acquire);
    Status found = state >= kClosed ? kLeft : is_dead(c, r) ? kDied : kOk;
    if (found != kOk) { c->culprit = r; return found; }
  }
  uint64_t theirs = c->line(owner).waiting.load(std::memory_order_acquire);
  bool elsewhere = theirs >> 8 > c->current >> 8 || (theirs >> 8 == c->current >> 8 && theirs != c->current);
  if (theirs && elsewhere) { c->culprit = owner; return kMismatch; }
  return kOk;
}

inline Status sleep_until(Comm* c, Flag& flag, int owner, uint64_t target, int64_t limit) {
  auto there = [&] { return flag.value.load(std::memory_order_acquire) >= target; };
  int64_t start = now();
  for (int64_t waited = 0;; waited = now() - start) {
    if (there()) return kOk;
    if (waited < c->spin_ns) {
      for (int k = 0; k < 32 && !there(); ++k) pool::relax();
    } else if (waited < c->yield_ns) {
      sched_yield();
    } else {
      c->line(c->rank).waiting.store(c->current, std::memory_order_release);
      Status trouble = look_around(c, owner);
      if (trouble == kOk && waited >= limit) { trouble = kTimeout; c->culprit = owner; }
      if (trouble != kOk) return there() ? kOk : trouble;   // it may have arrived just before it went
      doze(flag, target, std::min(kDozeNs, limit - waited));
    }
  }
}

inline Status wait_long(Comm* c, Flag& flag, int owner, uint64_t target, int64_t limit) {
  Status s = sleep_until(c, flag, owner, target, limit);
  c->line(c->rank).waiting.store(0, std::memory_order_release);
  return s;
}

inline Status wait_for(Comm* c, Flag& flag, int owner, uint64_t target, int64_t limit) {
  if (flag.value.load(std::memory_order_acquire) >= target) return kOk;
  return wait_long(c, flag, owner, target, limit);
}

// Publishes this rank's slot of the next round and waits for everybody's; expected(r) is the byte count r must announce.
template <class Expected>
Status meet(Comm* c, const Head& mine, int64_t limit, const Expected& expected) {
  uint64_t round = ++c->round;
  c->current = mine.call << 8 | mine.kind;
  Line& own = c->line(c->rank);
  own.head[round & 1] = mine;
  publish(own.arrived, round);
  for (int r = 0; r < c->size; ++r) {
    if (r == c->rank) continue;
    if (Status s = wait_for(c, c->line(r).arrived, r, round, limit)) return s;
    const Head& head = c->line(r).head[round & 1];
    if (head.kind != mine.kind || head.tag != mine.tag || head.call != mine.call || head.nbytes != expected(r)) {
      c->culprit = r;
      return kMismatch;
    }
  }
  return kOk;
}

inline int leave(Comm* c, State state, int status) {
  Line& own = c->line(c->rank);
  if (state == kFailed) own.blame.store(status << 16 | c->culprit, std::memory_order_release);
  uint32_t present = kPresent;
  own.state.compare_exchange_strong(present, state);        // a failed rank stays failed
  wake(own.arrived);
  wake(own.taken);
  if (c->rank == 0) wake(c->commands().sent);
  return status;
}

inline int done(Comm* c, Status status) { return status == kOk ? kOk : leave(c, kFailed, status); }

// What f returns; where memory is short this rank leaves, so that its peers learn why it does not come.
template <class F>
int with_memory(Comm* c, const F& f) noexcept {
  try {
    return f();
  } catch (const std::exception&) {
    c->culprit = c->rank;
    return done(c, kNoMemory);
  }
}

}  // namespace comm
