// One call on a workspace, as the workspace protocol has it (docs/memory-ordering.md):
//
//   a call is number e = state[0] + 1 and uses only half h = e & 1 of the staging memory and of the flags;
//   a flag holds (site, epoch), and means "the data of its source for call e is here" once its epoch has reached e;
//   the site says which call site its writer is at: another one than the reader's is an error, not a result;
//   a call finishes on a rank only after every rank has entered it (invariant I).
//
// So half h may be written again from call e + 2 on without any barrier: a rank inside e + 2 has finished e + 1, every
// rank had then entered e + 1 and so finished e, and nobody reads half h of e any more.
#pragma once

#include <cstdint>

#include "wait.h"

namespace symmpatterns {

constexpr int kStateWords = 16;

// The tables of a Workspace, as workspace.py documents them.
struct WorkspaceView {
  const int64_t* staging_ptrs; // [2, world_size]
  const int64_t* flag_ptrs; // [2, world_size]
  int32_t* state; // [kStateWords]
  int world_size;
  int32_t site; // the number that the ranks have agreed on for this call site, 0 if on none
};

// Deliberate mistakes, for tests that have to see the protocol's checks fail without it. Always 0 outside of them.
enum Fault : int {
  kOneHalf = 1, // every call uses half 0
  kNoAwait = 2, // flags are not awaited
  kSlowReader = 4, // no mistake, but the time between a wait and the reads that follow it: it brings others to light
};
extern int injected_faults;

class Call {
 public:
  // Refuses (Error) a workspace on which an earlier call has failed.
  Call(const WorkspaceView& view, Waiter waiter);
  // A call that was published and did not finish marks the workspace as broken: its flags are out, so neither it nor
  // another call may use its epoch again.
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  int rank() const { return waiter_.rank; }
  int world_size() const { return view_.world_size; }
  char* staging(int rank) const { return reinterpret_cast<char*>(view_.staging_ptrs[half_ * view_.world_size + rank]); }

  // Tells rank `to` (or all others) through its flag `index` that this rank's data is in place.
  void publish(int to, int64_t index);
  void publish_to_all(int64_t index);
  // Waits until rank `from` has published this rank's flag `index`.
  void await(int from, int64_t index);
  void await_all(int64_t first_index); // flag first_index + r of every other rank r

  // To be called once every rank is known to have entered the call, and this rank needs no more of the peers' data.
  void finish();

 private:
  Flag* flag(int rank, int64_t index) const {
    return reinterpret_cast<Flag*>(view_.flag_ptrs[half_ * view_.world_size + rank]) + index;
  }

  void record_failure(int code, int peer, int64_t index, FlagValue seen);

  WorkspaceView view_;
  Waiter waiter_;
  FlagValue value_; // what this rank's flags of this call hold
  int half_;
  bool is_published_ = false;
  bool is_finished_ = false;
};

// Returns when every rank has called it; flag r of each rank belongs to source r.
void barrier(const WorkspaceView& view, Waiter waiter);

} // namespace symmpatterns
