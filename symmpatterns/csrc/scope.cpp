// The allocator behind `with symmetric_memory():`. It stands in front of torch's CPU allocator and serves the threads
// that are inside a scope from symmetric memory; everybody else gets what the allocator behind it gives.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <limits>
#include <mutex>

#include "errors.h"
#include "host_memory.h"

namespace symmpatterns {
namespace {

thread_local int depth = 0;

c10::Allocator* behind = nullptr; // set once, before the allocator in front can be reached
c10::DeleterFnPtr delete_behind = nullptr;

// torch asks that one function can free whatever raw_allocate() returned, so both kinds of memory share a deleter.
// Only symmetric memory starts on a page boundary as a rule: the look-up is left out for nearly all other pointers.
void delete_any(void* pointer) {
  constexpr uintptr_t kPageMask = 4095;
  if (pointer != nullptr && (reinterpret_cast<uintptr_t>(pointer) & kPageMask) == 0) {
    const auto found = allocation_of(pointer);
    if (found && found->first == pointer) {
      c10::profiledCPUMemoryReporter().Delete(pointer);
      release(pointer);
      return;
    }
  }
  delete_behind(pointer);
}

class ScopedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    // Empty tensors have no memory; many operators make one first and resize it afterwards.
    if (depth > 0 && bytes > 0) {
      void* pointer = symmpatterns::allocate(bytes);
      c10::profiledCPUMemoryReporter().New(pointer, bytes);
      return {pointer, pointer, &delete_any, c10::Device(c10::kCPU)};
    }
    c10::DataPtr data = behind->allocate(bytes);
    if (delete_behind != nullptr) {
      (void)data.compare_exchange_deleter(delete_behind, &delete_any);
    }
    return data;
  }
  c10::DeleterFnPtr raw_deleter() const override { return delete_behind == nullptr ? nullptr : &delete_any; }
  bool is_simple_data_ptr(const c10::DataPtr& data) const override { return data.get() == data.get_context(); }
  void copy_data(void* dest, const void* src, std::size_t count) const override { default_copy_data(dest, src, count); }
};

void install() {
  static std::once_flag once;
  std::call_once(once, [] {
    behind = c10::GetAllocator(c10::kCPU);
    delete_behind = behind->raw_deleter();
    static auto* front = new ScopedAllocator; // lives as long as the tensors that it made
    c10::SetAllocator(c10::kCPU, front, std::numeric_limits<uint8_t>::max());
  });
  // One of the same priority that was installed later hides ours; scopes would silently do nothing.
  if (dynamic_cast<ScopedAllocator*>(c10::GetAllocator(c10::kCPU)) == nullptr) {
    throw Error("another CPU allocator was installed over the one of symmpatterns: symmetric_memory() cannot work");
  }
}

} // namespace

void enter_scope() {
  install();
  ++depth;
}

void exit_scope() {
  if (depth == 0) {
    throw Error("exit_scope: this thread is in no symmetric_memory() scope");
  }
  --depth;
}

int scope_depth() {
  return depth;
}

} // namespace symmpatterns
