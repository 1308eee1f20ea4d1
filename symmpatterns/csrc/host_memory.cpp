#include "host_memory.h"

#include <map>
#include <mutex>
#include <tuple>

#include "errors.h"
#include "rendezvous.h"

namespace symmpatterns {
namespace {

namespace symm = c10d::symmetric_memory;
using Handle = c10::intrusive_ptr<symm::SymmetricMemory>;

constexpr const char* kName = "SYMMPATTERNS_HOST";

struct Allocation {
  std::shared_ptr<Segment> segment;
  std::optional<std::string> group; // named at the allocation
  std::map<std::string, std::shared_ptr<Rendezvous>> rendezvous; // by group
  std::map<std::pair<std::string, size_t>, Handle> handles; // by group and offset
};

struct Registry {
  std::mutex mutex;
  std::map<uintptr_t, Allocation> allocations; // by address

  // The allocation that contains the address, or null; the caller holds the mutex.
  Allocation* find(const void* pointer) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) {
      return nullptr;
    }
    auto& [start, allocation] = *std::prev(next);
    return address < start + allocation.segment->data_bytes() ? &allocation : nullptr;
  }
};

// Never destroyed: tensors may be freed while the interpreter is being taken down.
Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

void* allocate_for(size_t bytes, const std::optional<std::string>& group) {
  auto segment = Segment::create(bytes, symm::get_signal_pad_size());
  void* pointer = segment->data();
  std::lock_guard<std::mutex> lock(registry().mutex);
  auto& allocation = registry().allocations[reinterpret_cast<uintptr_t>(pointer)];
  allocation.segment = std::move(segment);
  allocation.group = group;
  return pointer;
}

Handle rendezvous_of(void* pointer, const std::optional<std::string>& group_name) {
  std::shared_ptr<Segment> segment;
  std::shared_ptr<Rendezvous> shared;
  std::string group;
  size_t offset = 0;
  {
    std::lock_guard<std::mutex> lock(registry().mutex);
    Allocation* allocation = registry().find(pointer);
    if (allocation == nullptr) {
      return nullptr; // torch's convention for memory that is not symmetric
    }
    if (!group_name && !allocation->group) {
      throw Error("rendezvous: name a group");
    }
    group = group_name ? *group_name : *allocation->group;
    segment = allocation->segment;
    offset = static_cast<size_t>(static_cast<char*>(pointer) - segment->data());
    const auto known = allocation->handles.find({group, offset});
    if (known != allocation->handles.end()) {
      return known->second;
    }
    const auto met = allocation->rendezvous.find(group);
    if (met != allocation->rendezvous.end()) {
      shared = met->second;
    }
  }
  if (!shared) {
    shared = meet(segment, group); // waits for the peers, so without the lock
  }
  auto handle = c10::make_intrusive<HostSymmetricMemory>(shared, offset);
  std::lock_guard<std::mutex> lock(registry().mutex);
  Allocation* allocation = registry().find(pointer);
  if (allocation != nullptr && allocation->segment == segment) {
    allocation->rendezvous.emplace(group, shared);
    return allocation->handles.emplace(std::make_pair(group, offset), handle).first->second;
  }
  return handle; // freed meanwhile by another thread: the handle keeps what it needs
}

class HostAllocator : public symm::SymmetricMemoryAllocator {
 public:
  void* alloc(size_t size, int /*device_idx*/, const std::optional<std::string>& group_name) override {
    return allocate_for(size, group_name);
  }
  void free(void* pointer) override { release(pointer); }
  size_t get_alloc_size(void* pointer) override {
    const auto found = allocation_of(pointer);
    if (!found) {
      throw Error("get_alloc_size: the memory is not symmetric");
    }
    return found->second;
  }
  Handle rendezvous(void* pointer, const std::optional<std::string>& group_name) override {
    return rendezvous_of(pointer, group_name);
  }
  bool has_multicast_support(int /*device_idx*/) override { return false; }
  c10::DeviceType supported_device_type() override { return c10::kCPU; }
  std::string name() override { return kName; }
  bool has_allocation(void* pointer) /* no override: not a virtual of torch 2.11 */ {
    return allocation_of(pointer).has_value();
  }
};

} // namespace

void register_allocator() {
  if (symm::has_allocator(c10::kCPU)) {
    const std::string name = symm::get_allocator(c10::kCPU)->name();
    if (name != kName) {
      throw Error(
          "torch's symmetric memory already has an allocator for CPU tensors, '" + name +
          "', and symmpatterns does not replace it: load symmpatterns without it");
    }
    return;
  }
  symm::register_allocator(c10::kCPU, c10::make_intrusive<HostAllocator>());
}

void* allocate(size_t bytes) {
  return allocate_for(bytes, std::nullopt);
}

void release(void* pointer) {
  Allocation dead;
  {
    std::lock_guard<std::mutex> lock(registry().mutex);
    const auto found = registry().allocations.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == registry().allocations.end()) {
      return;
    }
    dead = std::move(found->second);
    registry().allocations.erase(found);
  }
  dead.handles.clear();
  dead.rendezvous.clear();
  Segment::recycle(std::move(dead.segment));
}

std::optional<std::pair<void*, size_t>> allocation_of(const void* pointer) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  const Allocation* allocation = registry().find(pointer);
  if (allocation == nullptr) {
    return std::nullopt;
  }
  return std::make_pair(static_cast<void*>(allocation->segment->data()), allocation->segment->data_bytes());
}

} // namespace symmpatterns
