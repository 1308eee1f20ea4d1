#include "process.h"

#include <unistd.h>

#include <fstream>
#include <map>
#include <mutex>
#include <sstream>

#include "errors.h"

namespace symmpatterns {
namespace {

struct Stat {
  char state;
  uint64_t start_time;
};

// Fields 3 and 22 of /proc/<pid>/stat; the name before them is in parentheses and may itself contain any of them.
std::optional<Stat> read_stat(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  if (!file || !std::getline(file, text)) {
    return std::nullopt;
  }
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) {
    return std::nullopt;
  }
  std::istringstream fields(text.substr(name_end + 1));
  Stat stat{};
  fields >> stat.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) {
    fields >> skipped;
  }
  fields >> stat.start_time;
  return fields ? std::optional<Stat>(stat) : std::nullopt;
}

struct Owners {
  struct Range {
    uintptr_t end;
    ProcessId owner;
  };
  std::mutex mutex;
  std::map<uintptr_t, Range> ranges;
};

// Never destroyed: tensors may be freed while the interpreter is being taken down.
Owners& owners() {
  static auto* instance = new Owners;
  return *instance;
}

} // namespace

ProcessId ProcessId::self() {
  const pid_t pid = getpid(); // asked every time: the process may have been forked
  const auto stat = read_stat(pid);
  if (!stat) {
    throw Error("cannot read /proc/self/stat: the host backend needs a mounted /proc");
  }
  return {pid, stat->start_time};
}

bool ProcessId::is_alive() const {
  const auto stat = read_stat(pid);
  return stat && stat->start_time == start_time && stat->state != 'Z' && stat->state != 'X';
}

const std::string& host_identity() {
  static const std::string identity = [] {
    std::ifstream file("/proc/sys/kernel/random/boot_id");
    std::string boot;
    std::getline(file, boot);
    char space[64] = {};
    const ssize_t length = readlink("/proc/self/ns/pid", space, sizeof(space) - 1);
    if (boot.empty() || length <= 0) {
      throw Error("cannot read the boot id or the PID namespace from /proc: the host backend needs a mounted /proc");
    }
    return boot + "," + space;
  }();
  return identity;
}

void remember_owner(const void* start, size_t size, ProcessId owner) {
  const auto begin = reinterpret_cast<uintptr_t>(start);
  std::lock_guard<std::mutex> lock(owners().mutex);
  owners().ranges[begin] = {begin + size, owner};
}

void forget_owner(const void* start) {
  std::lock_guard<std::mutex> lock(owners().mutex);
  owners().ranges.erase(reinterpret_cast<uintptr_t>(start));
}

std::optional<ProcessId> owner_of(const void* address) {
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  std::lock_guard<std::mutex> lock(owners().mutex);
  auto next = owners().ranges.upper_bound(wanted);
  if (next == owners().ranges.begin()) {
    return std::nullopt;
  }
  const auto& range = std::prev(next)->second;
  return wanted < range.end ? std::optional<ProcessId>(range.owner) : std::nullopt;
}

} // namespace symmpatterns
