#include "workspace.h"

#include <chrono>
#include <thread>
#include <utility>

#include "errors.h"

namespace symmpatterns {

int injected_faults = 0;

namespace {
// state: [0] epoch of the last finished call, [1] programs that have finished, then the record of a failure
enum StateWord {
  kEpoch = 0,
  kErrorCode = 2,
  kErrorPeer = 3,
  kErrorFlag = 4,
  kErrorExpected = 5,
  kErrorSeen = 6,
  kErrorSite = 7,
  kErrorSeenSite = 8
};
enum ErrorCode { kTimedOut = 1, kInterrupted = 2, kDiverged = 3 };

std::string explain(const int32_t* state) {
  const std::string peer = "rank " + std::to_string(state[kErrorPeer]);
  switch (state[kErrorCode]) {
    case kTimedOut:
      return "waited in vain for " + peer;
    case kDiverged:
      return "met " + peer + " at another call";
    default:
      return "was interrupted";
  }
}
} // namespace

Call::Call(const WorkspaceView& view, Waiter waiter) : view_(view), waiter_(std::move(waiter)) {
  waiter_.world_size = view.world_size;
  if (view_.state[kErrorCode] != 0) {
    throw Error(waiter_.what + ": group '" + waiter_.group + "' can no longer be used: an earlier call of this rank " +
                explain(view_.state));
  }
  if (view.flag_ptrs[0] == 0) {
    throw Error(waiter_.what + ": the workspace has no memory yet; call reserve() on it first");
  }
  value_ = flag_value(view_.site, static_cast<uint32_t>(view_.state[kEpoch]) + 1);
  half_ = (injected_faults & kOneHalf) ? 0 : value_ & 1;
}

Call::~Call() {
  if (is_published_ && !is_finished_ && view_.state[kErrorCode] == 0) {
    record_failure(kInterrupted, -1, -1, value_);
  }
}

void Call::record_failure(int code, int peer, int64_t index, FlagValue seen) {
  view_.state[kErrorPeer] = peer;
  view_.state[kErrorFlag] = static_cast<int32_t>(index);
  view_.state[kErrorExpected] = epoch_of(value_);
  view_.state[kErrorSeen] = epoch_of(seen);
  view_.state[kErrorSite] = site_of(value_);
  view_.state[kErrorSeenSite] = site_of(seen);
  view_.state[kErrorCode] = code;
}

void Call::publish(int to, int64_t index) {
  is_published_ = true;
  symmpatterns::publish(flag(to, index), value_);
}

void Call::publish_to_all(int64_t index) {
  for (int to = 0; to < world_size(); ++to) {
    if (to != rank()) {
      publish(to, index);
    }
  }
}

void Call::await(int from, int64_t index) {
  if (injected_faults & kNoAwait) {
    return;
  }
  const Flag* awaited = flag(rank(), index);
  try {
    await_flag(awaited, epoch_of(value_), waiter_, from, staging(from));
  } catch (const Timeout&) {
    record_failure(kTimedOut, from, index, awaited->load(std::memory_order_relaxed));
    throw;
  }
  // The acquire was on this very word. A writer cannot be ahead of its reader, so the value is that of this call.
  if (const FlagValue seen = awaited->load(std::memory_order_relaxed); site_of(seen) != site_of(value_)) {
    record_failure(kDiverged, from, index, seen);
    throw Divergence(waiter_.what + ": rank " + std::to_string(rank()) + " of group '" + waiter_.group +
                     "' met rank " + std::to_string(from) + " at another call");
  }
}

void Call::await_all(int64_t first_index) {
  for (int step = 1; step < world_size(); ++step) {
    const int from = (rank() + step) % world_size();
    await(from, first_index + from);
  }
  if (injected_faults & kSlowReader) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  }
}

void Call::finish() {
  view_.state[kEpoch] = epoch_of(value_);
  view_.state[1] = 0;
  is_finished_ = true;
}

void barrier(const WorkspaceView& view, Waiter waiter) {
  Call call(view, std::move(waiter));
  call.publish_to_all(call.rank());
  call.await_all(0); // invariant I: every rank has entered
  call.finish();
}

} // namespace symmpatterns
