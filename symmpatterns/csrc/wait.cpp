#include "wait.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <limits>

#include "errors.h"
#include "process.h"
#include "python_hooks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace symmpatterns {
namespace {

constexpr int kSpins = 800; // about 8 us: a wake-up costs more, but on a busy machine so does every spin
constexpr int kSpinsOfACrowd = 100; // more ranks than cores: the awaited one is probably not running
constexpr long kShortestNap_ns = 100'000;
constexpr long kLongestNap_ns = 5'000'000;
constexpr int kNapsOfALength = 8;
constexpr double kLookEvery_s = 0.1;

int cores() {
  static const int count = [] {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  }();
  return count;
}

void cpu_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

double between(std::chrono::steady_clock::time_point from, std::chrono::steady_clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

} // namespace

Backoff::Backoff(const Waiter& waiter)
    : timeout_s_(waiter.timeout_s), spins_left_(waiter.world_size > cores() ? kSpinsOfACrowd : kSpins) {}

bool Backoff::pause(const void* word, uint32_t seen) {
  if (spins_left_ > 0) {
    --spins_left_;
    cpu_pause();
    return true;
  }
  if (!started_) {
    started_ = true;
    start_ = last_look_ = Clock::now();
  }
  const double left = timeout_s_ - seconds();
  if (left <= 0) {
    return false;
  }
  const int doublings = static_cast<int>(std::min<int64_t>(naps_++ / kNapsOfALength, 10));
  const auto longest = static_cast<long>(std::min(left * 1e9, static_cast<double>(kLongestNap_ns)));
  const timespec nap{0, std::min(kShortestNap_ns << doublings, longest)};
  // Either ends early when a signal comes, and is_time_to_look() then runs its handler.
  if (word != nullptr) {
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &nap, nullptr, 0);
  } else {
    nanosleep(&nap, nullptr);
  }
  return true;
}

void wake(const void* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
}

bool Backoff::is_time_to_look() {
  if (naps_ == 0) {
    return false;
  }
  const auto now = Clock::now();
  if (between(last_look_, now) < kLookEvery_s) {
    return false;
  }
  last_look_ = now;
  check_signals();
  return true;
}

double Backoff::seconds() const {
  return started_ ? between(start_, Clock::now()) : 0.0;
}

bool has_ended(const void* peer_memory) {
  const auto owner = owner_of(peer_memory);
  return owner && !owner->is_alive();
}

std::string describe_timeout(
    const Waiter& waiter, int peer, const void* peer_memory, const std::string& detail, double seconds) {
  char waited[32];
  std::snprintf(waited, sizeof(waited), "%.3g", seconds);
  std::string text = waiter.what + ": rank " + std::to_string(waiter.rank) + " of group '" + waiter.group +
      "' waited " + waited + " s for rank " + std::to_string(peer) + " (" + detail + "); ";
  const auto owner = owner_of(peer_memory);
  if (!owner) {
    return text + "whether that rank's process is alive is not known";
  }
  const std::string process = "its process " + std::to_string(owner->pid);
  if (!owner->is_alive()) {
    return text + process + " has ended";
  }
  return text + process + " is alive: it hangs, took another path, or needs more than config.timeout_s";
}

void await_flag(const Flag* flag, int32_t epoch, const Waiter& waiter, int peer, const void* peer_memory) {
  Backoff backoff(waiter);
  bool in_time = true;
  for (;;) {
    const int32_t seen = epoch_of(flag->load(std::memory_order_relaxed));
    // Checked after everything else: the last thing that a finished process did may have been to publish.
    const bool dead = in_time && backoff.is_time_to_look() && has_ended(peer_memory);
    if (has_reached(flag, epoch)) {
      return;
    }
    if (dead || !in_time) {
      const std::string detail = "expected epoch " + std::to_string(epoch) + ", seen " + std::to_string(seen);
      throw Timeout(describe_timeout(waiter, peer, peer_memory, detail, backoff.seconds()));
    }
    in_time = backoff.pause(epoch_word(flag), static_cast<uint32_t>(seen));
  }
}

} // namespace symmpatterns
