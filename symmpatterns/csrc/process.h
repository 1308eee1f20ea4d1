// Processes of this host: who they are and whether they still live.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace symmpatterns {

// A pid together with the process's start time, because pids are reused.
struct ProcessId {
  pid_t pid = 0;
  uint64_t start_time = 0;

  static ProcessId self();
  // False once the process has ended, also while it is an unreaped zombie.
  bool is_alive() const;
};

// Equal in two processes only if they can open each other's file descriptors: same boot, same PID namespace.
const std::string& host_identity();

// Remembers to whom the bytes [start, start + size) mapped into this process belong.
void remember_owner(const void* start, size_t size, ProcessId owner);
void forget_owner(const void* start);
std::optional<ProcessId> owner_of(const void* address);

} // namespace symmpatterns
