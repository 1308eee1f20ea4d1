// How the ranks of a group find each other's segments: through the group's store, once for each segment and group.
#pragma once

#include <torch/csrc/distributed/c10d/symm_mem/SymmetricMemory.hpp>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "segment.h"

namespace symmpatterns {

// One segment as all ranks of a group see it. Keeps the own memory and the peers' mappings alive.
struct Rendezvous {
  std::string group;
  int rank = 0;
  int world_size = 1;
  std::shared_ptr<Segment> own;
  std::vector<std::unique_ptr<PeerMapping>> peers; // null at the own rank
  std::vector<void*> buffers; // of each rank, as mapped here
  std::vector<void*> pads;
  std::atomic<bool> is_broken{false}; // a barrier of this rank has not ended as it should
};

// Collective over the group. Throws on all ranks alike when sizes differ or when one rank cannot map another's memory.
std::shared_ptr<Rendezvous> meet(const std::shared_ptr<Segment>& own, const std::string& group);

// What torch hands out for a symmetric tensor.
class HostSymmetricMemory : public c10d::symmetric_memory::SymmetricMemory {
 public:
  HostSymmetricMemory(std::shared_ptr<Rendezvous> shared, size_t offset)
      : shared_(std::move(shared)), offset_(offset) {}

  std::vector<void*> get_buffer_ptrs() override { return shared_->buffers; }
  std::vector<void*> get_signal_pad_ptrs() override { return shared_->pads; }
  void** get_buffer_ptrs_dev() override { return shared_->buffers.data(); }
  void** get_signal_pad_ptrs_dev() override { return shared_->pads.data(); }
  size_t get_buffer_size() override { return shared_->own->data_bytes(); }
  size_t get_offset() override { return offset_; }
  bool has_multicast_support() override { return false; }
  void* get_multicast_ptr() override { return nullptr; }
  void barrier(int channel, size_t timeout_ms) override { barrier(channel, timeout_ms, 1); }
  // A barrier in which every rank says what it is about; throws Divergence unless all say the same. `token` is not 0.
  // After one that has failed or was interrupted every other is refused (Error).
  void barrier(int channel, size_t timeout_ms, uint32_t token);
  void put_signal(int dst_rank, int channel, size_t timeout_ms) override;
  void wait_signal(int src_rank, int channel, size_t timeout_ms) override;
  int get_rank() override { return shared_->rank; }
  int get_world_size() override { return shared_->world_size; }
  c10::Device get_device() override { return c10::Device(c10::kCPU); }
  bool world_within_direct_access() override { return true; }

 private:
  void check(int peer, int channel) const;
  void meet_all(int channel, size_t timeout_ms, uint32_t token);
  std::atomic<uint32_t>* signal(int pad_of, int channel, int slot) const;
  // Waits until the word is zero and stores `token`; or until it is not, stores zero, and returns what it was.
  void put(const char* what, int channel, int peer, uint32_t token, size_t timeout_ms);
  uint32_t take(const char* what, int channel, int peer, size_t timeout_ms);
  template <typename Swap>
  void exchange_signal(const char* what, std::atomic<uint32_t>* word, int peer, const Swap& swap, size_t timeout_ms);

  std::shared_ptr<Rendezvous> shared_;
  size_t offset_;
};

} // namespace symmpatterns
