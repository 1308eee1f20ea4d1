#include "wait.h"

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstdio>

#include "errors.h"
#include "process.h"
#include "python_hooks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace symmpatterns {
namespace {

constexpr int kSpins = 400; // about 5 us
constexpr double kYieldFor_s = 1e-3; // each yield gives the core to another rank that can run
constexpr long kShortestSleep_ns = 20'000;
constexpr long kLongestSleep_ns = 1'000'000;
constexpr double kLookEvery_s = 0.1;

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

bool Backoff::pause() {
  if (spins_ < kSpins) {
    ++spins_;
    cpu_pause();
    return true;
  }
  if (!started_) {
    started_ = true;
    start_ = last_look_ = Clock::now();
  }
  const double waited = seconds();
  if (waited < kYieldFor_s) {
    sched_yield();
  } else {
    const int doublings = static_cast<int>(std::min<int64_t>(naps_++ / 16, 6));
    const timespec nap{0, std::min(kShortestSleep_ns << doublings, kLongestSleep_ns)};
    nanosleep(&nap, nullptr); // a signal ends it early, and is_time_to_look() then runs its handler
  }
  return waited < timeout_s_;
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
  if (has_reached(flag, epoch)) {
    return;
  }
  Backoff backoff(waiter.timeout_s);
  bool in_time = true;
  while (!has_reached(flag, epoch)) {
    const bool look = backoff.is_time_to_look();
    if (in_time && !(look && has_ended(peer_memory))) {
      in_time = backoff.pause();
      continue;
    }
    if (has_reached(flag, epoch)) { // the last thing that a finished process did may have been to publish
      return;
    }
    const int32_t seen = flag->load(std::memory_order_relaxed);
    const std::string detail = "expected epoch " + std::to_string(epoch) + ", seen " + std::to_string(seen);
    throw Timeout(describe_timeout(waiter, peer, peer_memory, detail, backoff.seconds()));
  }
}

} // namespace symmpatterns
