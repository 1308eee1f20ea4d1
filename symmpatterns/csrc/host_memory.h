// The host backend of torch's symmetric memory: CPU tensors in memory that the ranks of one host share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>

namespace symmpatterns {

// Makes torch's symmetric memory API serve CPU tensors. Again: nothing happens. Throws Error when torch already has
// another allocator for them.
void register_allocator();

// Local allocation and release; `allocate` never returns null.
void* allocate(size_t bytes);
void release(void* pointer);

// The allocation that `pointer` points into, as (address, bytes).
std::optional<std::pair<void*, size_t>> allocation_of(const void* pointer);

// While a thread is in a scope, torch's CPU allocator gives it symmetric memory. Scopes nest.
void enter_scope();
void exit_scope();
int scope_depth();

} // namespace symmpatterns
