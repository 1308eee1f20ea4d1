// Waiting for other processes: flags in shared memory, bounded in time, polite to the other ranks of a busy machine.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

namespace symmpatterns {

// A flag: the number of a call in its lower half, the number of the call site in its upper.
using FlagValue = int64_t;
using Flag = std::atomic<FlagValue>;
static_assert(sizeof(Flag) == 8 && Flag::is_always_lock_free, "flags are plain 64-bit words in shared memory");

inline FlagValue flag_value(int32_t site, uint32_t epoch) {
  return static_cast<FlagValue>(static_cast<uint64_t>(static_cast<uint32_t>(site)) << 32 | epoch);
}
inline int32_t epoch_of(FlagValue value) {
  return static_cast<int32_t>(static_cast<uint32_t>(value));
}
inline int32_t site_of(FlagValue value) {
  return static_cast<int32_t>(static_cast<uint64_t>(value) >> 32);
}
// What a futex can sleep on: the half that changes with every call.
inline const void* epoch_word(const Flag* flag) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the lower half comes first");
  return flag;
}

// Who waits, and for how long.
struct Waiter {
  std::string what; // the operation, for the error text
  std::string group;
  int rank = 0;
  double timeout_s = 0;
  int world_size = 2;
};

// Spins for a moment, then lets the kernel put the thread to sleep: with more ranks than cores, or on a busy machine,
// the awaited rank needs this core.
class Backoff {
 public:
  explicit Backoff(const Waiter& waiter);
  // Waits a little, for not much longer than until wake(word) if the word still holds `seen` (none: no word tells).
  // False when the time is over.
  bool pause(const void* word = nullptr, uint32_t seen = 0);
  // True about ten times a second: when to look whether the peer lives. Throws what a Python signal handler raised.
  bool is_time_to_look();
  double seconds() const;

 private:
  using Clock = std::chrono::steady_clock;
  double timeout_s_;
  int spins_left_;
  int64_t naps_ = 0;
  bool started_ = false;
  Clock::time_point start_;
  Clock::time_point last_look_;
};

// Ends the naps of those that wait for a change of the word. Waiters also look by themselves every few milliseconds,
// so a writer that does not wake them (a Triton kernel) is only noticed later.
void wake(const void* word);

// Everything this rank wrote before is visible to whoever awaits the flag at the epoch of `value`.
inline void publish(Flag* flag, FlagValue value) {
  flag->store(value, std::memory_order_release);
  wake(epoch_word(flag));
}

// Whether the flag has reached `epoch`; right across the wrap of 32-bit epochs.
inline bool has_reached(const Flag* flag, int32_t epoch) {
  const auto seen = static_cast<uint32_t>(epoch_of(flag->load(std::memory_order_acquire)));
  return static_cast<int32_t>(seen - static_cast<uint32_t>(epoch)) >= 0;
}

// Returns when rank `peer` has published `epoch`. `peer_memory` is any mapped address of the peer's memory: it tells
// whose process to look after. Throws Timeout.
void await_flag(const Flag* flag, int32_t epoch, const Waiter& waiter, int peer, const void* peer_memory);

// The text of the exception when `peer` did not come; `detail` says what was expected and seen.
std::string describe_timeout(
    const Waiter& waiter, int peer, const void* peer_memory, const std::string& detail, double seconds);

// Whether the process that owns `peer_memory` is known to have ended.
bool has_ended(const void* peer_memory);

} // namespace symmpatterns
