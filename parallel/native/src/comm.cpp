// What the ranks of one host do together besides sums: attach, join tensors, pass commands, meet at a barrier, leave.
#include "comm.h"

#include <new>

using namespace comm;

namespace {

// Copies bytes [a, b) of a rank's packed rows to where these rows stand in the joined tensor.
void scatter(const char* src, uint64_t a, uint64_t b, uint64_t row, uint64_t joined_row, char* out) {
  for (uint64_t at = a; at < b;) {
    uint64_t n = std::min(b - at, row - at % row);
    std::memcpy(out + at / row * joined_row + at % row, src + (at - a), n);
    at += n;
  }
}

}  // namespace

extern "C" {

uint64_t comm_bytes(int size, uint64_t cap) { return size * sizeof(Line) + sizeof(Ring) + 2 * size * cap; }

Comm* comm_attach(char* base, int rank, int size, uint64_t cap) {
  Comm* c = new (std::nothrow) Comm{base, rank, size, cap, 0, 0, 0};
  if (!c) return nullptr;
  c->line(rank).pid = getpid();
  c->line(rank).state.store(kPresent, std::memory_order_release);
  return c;
}

// Once all ranks have attached: hold on to their processes, to learn at once of a death.
void comm_watch(Comm* c) {
  c->pidfd.assign(c->size, -1);
#ifdef SYS_pidfd_open
  for (int r = 0; r < c->size; ++r)
    if (r != c->rank) c->pidfd[r] = static_cast<int>(syscall(SYS_pidfd_open, c->line(r).pid, 0));
#endif
}

void comm_limits(Comm* c, int64_t spin_ns, int64_t yield_ns, int64_t limit_ns) {
  c->spin_ns = spin_ns, c->yield_ns = yield_ns, c->limit_ns = limit_ns;
}

void comm_leave(Comm* c, int status) { leave(c, status ? kFailed : kClosed, status); }

void comm_detach(Comm* c) {
  for (int fd : c->pidfd) if (fd >= 0) close(fd);
  delete c;
}

char* comm_slot(Comm* c, uint64_t nbytes) { return nbytes <= c->cap ? c->slot(c->round + 1, c->rank) : nullptr; }

// Joins the ranks' [outer, rows[r]] bytes side by side on rank dst (-1: on all).
int comm_gather(Comm* c, uint32_t kind, uint64_t call, const char* x, uint64_t outer, const uint64_t* rows, int dst, char* out) {
  uint64_t joined = 0, most = 0;
  for (int r = 0; r < c->size; ++r) joined += rows[r], most = std::max(most, outer * rows[r]);
  Head head{kind, static_cast<uint32_t>(dst), outer * rows[c->rank], call};
  for (uint64_t a = 0; a < most || a == 0; a += c->cap) {
    auto length = [&](int r) { return std::min(outer * rows[r], a + c->cap); };
    if (a < length(c->rank)) std::memcpy(c->slot(c->round + 1, c->rank), x + a, length(c->rank) - a);
    if (Status s = meet(c, head, c->limit_ns, [&](int r) { return outer * rows[r]; })) return done(c, s);
    char* to = out;
    for (int r = 0; r < c->size && (dst < 0 || dst == c->rank); to += rows[r++])
      if (a < length(r)) scatter(r == c->rank ? x + a : c->slot(c->round, r), a, length(r), rows[r], joined, to);
  }
  return kOk;
}

int comm_barrier(Comm* c, uint32_t kind, uint64_t call, int64_t limit_ns) {
  return done(c, meet(c, {kind, 0, 0, call}, limit_ns, [](int) { return 0u; }));
}

int comm_send(Comm* c, uint32_t kind, uint64_t call, const char* data, uint64_t total, int64_t limit_ns) {
  Ring& ring = c->commands();
  c->current = call << 8 | kind;
  for (uint64_t at = 0; at < total || at == 0; at += kRingBytes) {
    uint64_t position = ++c->ring;
    for (int r = 1; r < c->size && position > kRing; ++r)
      if (Status s = wait_for(c, c->line(r).taken, r, position - kRing, limit_ns)) return done(c, s);
    Chunk& chunk = ring.chunk[position % kRing];
    chunk.total = total, chunk.call = call, chunk.nbytes = std::min(kRingBytes, total - at);
    std::memcpy(chunk.data, data + at, chunk.nbytes);
    publish(ring.sent, position);
  }
  return kOk;
}

// Waits for the next message; a timeout leaves the comm in order, so that the caller may go on waiting.
int comm_peek(Comm* c, uint32_t kind, uint64_t call, int64_t limit_ns, uint64_t* total) {
  c->current = call << 8 | kind;
  Status s = wait_for(c, c->commands().sent, 0, c->ring + 1, limit_ns);
  if (s == kTimeout) return s;
  if (s == kOk) {
    const Chunk& chunk = c->commands().chunk[(c->ring + 1) % kRing];
    *total = chunk.total;
    if (chunk.call != call) { c->culprit = 0; s = kMismatch; }
  }
  return done(c, s);
}

int comm_receive(Comm* c, char* out, uint64_t total, int64_t limit_ns) {
  for (uint64_t at = 0; at < total || at == 0;) {
    uint64_t position = c->ring + 1;
    if (Status s = wait_for(c, c->commands().sent, 0, position, limit_ns)) return done(c, s);
    const Chunk& chunk = c->commands().chunk[position % kRing];
    if (chunk.nbytes > std::min(kRingBytes, total - at)) { c->culprit = 0; return done(c, kMismatch); }
    std::memcpy(out + at, chunk.data, chunk.nbytes);
    at += std::max<uint64_t>(1, chunk.nbytes);
    c->ring = position;
    publish(c->line(c->rank).taken, position);
  }
  return kOk;
}

// Per rank: rounds published; kind, bytes (-1: unknown) and call it is in; whether it left (2: closed, 3: failed) and whom it
// blames (status << 16 | rank); whether it died.
int comm_report(Comm* c, int64_t* out) {
  for (int r = 0; r < c->size; ++r, out += 7) {
    Line& line = c->line(r);
    uint64_t round = line.arrived.value.load(std::memory_order_acquire), waiting = line.waiting.load(std::memory_order_acquire);
    const Head& head = line.head[round & 1];
    bool other = waiting && (waiting >> 8) != head.call;
    out[0] = static_cast<int64_t>(round), out[1] = other ? waiting & 255 : head.kind;
    out[2] = other ? -1 : static_cast<int64_t>(head.nbytes), out[3] = static_cast<int64_t>(other ? waiting >> 8 : head.call);
    out[4] = line.state.load(), out[5] = line.blame.load(), out[6] = r != c->rank && is_dead(c, r);
  }
  return c->culprit;
}

}  // extern "C"
