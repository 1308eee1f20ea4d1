#include "rendezvous.h"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <atomic>
#include <map>
#include <mutex>

#include "errors.h"
#include "python_hooks.h"
#include "wait.h"

namespace symmpatterns {
namespace {

using c10d::symmetric_memory::GroupInfo;

// The registered information of a group, or that of the process group of that name (not every torch version registers
// the groups that init_process_group makes).
GroupInfo find_group(const std::string& name) {
  try {
    return c10d::symmetric_memory::get_group_info(name);
  } catch (const c10::Error&) {
  }
  try {
    const auto group = c10d::resolve_process_group(name);
    return {group->getRank(), group->getSize(), group->getStore()};
  } catch (const c10::Error&) {
    throw Error("rendezvous: there is no group named '" + name + "' in this process");
  }
}

// The rendezvous of one group, in program order: every rank counts them alike.
struct Sequence {
  std::mutex mutex;
  int64_t next = 0;
  bool is_open = false; // one has begun, and this rank does not know that all have come to its end
  std::string stale_key; // of the rendezvous before
};

Sequence& sequence_of(const std::string& group) {
  static auto* mutex = new std::mutex;
  static auto* sequences = new std::map<std::string, Sequence>;
  std::lock_guard<std::mutex> lock(*mutex);
  return (*sequences)[group];
}

// What users call a group: "symmpatterns/<name>/<generation>" is what groups.py tells torch.
std::string shown(const std::string& group) {
  const std::string ours = "symmpatterns/";
  const size_t end = group.rfind('/');
  return group.rfind(ours, 0) == 0 && end >= ours.size() ? group.substr(ours.size(), end - ours.size()) : group;
}

class Exchange {
 public:
  Exchange(const GroupInfo& info, const std::string& group, int64_t number)
      : store_(info.store),
        world_size_(info.world_size),
        waiter_{"rendezvous", shown(group), info.rank, default_timeout_s(), info.world_size},
        prefix_("symmpatterns/host/" + group + "/" + std::to_string(number) + "/") {}

  std::string key(const std::string& round, int rank) const { return prefix_ + round + "/" + std::to_string(rank); }

  // Every rank's text, in rank order.
  std::vector<std::string> all_gather(const std::string& round, const std::string& mine) {
    store_->set(key(round, waiter_.rank), std::vector<uint8_t>(mine.begin(), mine.end()));
    std::vector<std::string> all(world_size_);
    for (int rank = 0; rank < world_size_; ++rank) {
      if (rank == waiter_.rank) {
        all[rank] = mine;
        continue;
      }
      await(key(round, rank), rank);
      const auto bytes = store_->get(key(round, rank));
      all[rank].assign(bytes.begin(), bytes.end());
    }
    return all;
  }

  void forget(const std::string& old_key) {
    if (!old_key.empty()) {
      store_->deleteKey(old_key); // stores that cannot delete return false
    }
  }

  // Whose memory tells, from the first round on, whether a rank still lives.
  std::vector<const void*> peer_memory;

 private:
  // Polls instead of Store::wait, which neither handles signals nor notices a peer's death.
  void await(const std::string& wanted, int rank) {
    Backoff backoff(waiter_);
    const void* memory = peer_memory.empty() ? nullptr : peer_memory[rank];
    while (!store_->check({wanted})) {
      const bool dead = backoff.is_time_to_look() && has_ended(memory);
      if ((dead || !backoff.pause()) && !store_->check({wanted})) {
        throw Timeout(describe_timeout(waiter_, rank, memory, "it did not come", backoff.seconds()));
      }
    }
  }

  c10::intrusive_ptr<c10d::Store> store_;
  int world_size_;
  Waiter waiter_;
  std::string prefix_;
};

void check_equal_sizes(const std::vector<Descriptor>& all, const std::string& group) {
  bool equal = true;
  std::string sizes;
  for (size_t rank = 0; rank < all.size(); ++rank) {
    equal = equal && all[rank].data_bytes == all[0].data_bytes && all[rank].pad_bytes == all[0].pad_bytes;
    sizes += (rank ? ", rank " : "rank ") + std::to_string(rank) + " has " + std::to_string(all[rank].data_bytes) +
        " bytes (signal pad " + std::to_string(all[rank].pad_bytes) + ")";
  }
  if (!equal) {
    throw Divergence(
        "rendezvous over group '" + shown(group) + "' needs memory of the same size on every rank: " + sizes);
  }
}

} // namespace

std::shared_ptr<Rendezvous> meet(const std::shared_ptr<Segment>& own, const std::string& group) {
  WithoutGil without_gil;
  const GroupInfo info = find_group(group);
  auto shared = std::make_shared<Rendezvous>();
  shared->group = shown(group);
  shared->rank = info.rank;
  shared->world_size = info.world_size;
  shared->own = own;
  shared->peers.resize(info.world_size);
  shared->buffers.assign(info.world_size, own->data());
  shared->pads.assign(info.world_size, own->pad());
  if (info.world_size == 1) {
    return shared;
  }
  Sequence& sequence = sequence_of(group);
  std::lock_guard<std::mutex> lock(sequence.mutex);
  if (sequence.is_open) {
    throw Error("rendezvous over group '" + shown(group) +
                "': the group can no longer be used, because an earlier rendezvous of this rank failed or was interrupted");
  }
  sequence.is_open = true;
  Exchange exchange(info, group, sequence.next++);

  std::vector<Descriptor> all;
  for (const auto& text : exchange.all_gather("memory", own->publish().serialize())) {
    all.push_back(Descriptor::parse(text));
  }
  // Who is here has left the rendezvous before, and so has everybody read its keys: all are here.
  exchange.forget(sequence.stale_key);
  sequence.stale_key.clear();
  sequence.is_open = false;
  check_equal_sizes(all, group);
  sequence.is_open = true;

  std::string failure;
  exchange.peer_memory.assign(info.world_size, nullptr);
  for (int rank = 0; rank < info.world_size && failure.empty(); ++rank) {
    if (rank == info.rank) {
      continue;
    }
    try {
      shared->peers[rank] = std::make_unique<PeerMapping>(all[rank]);
      shared->buffers[rank] = shared->peers[rank]->data();
      shared->pads[rank] = shared->peers[rank]->pad();
      exchange.peer_memory[rank] = shared->buffers[rank];
    } catch (const Error& error) {
      failure = error.what();
    }
  }
  // The second round makes a failure of one rank the failure of all, and keeps every segment until all have opened it.
  const auto failures = exchange.all_gather("mapped", failure);
  exchange.forget(exchange.key("memory", info.rank));
  sequence.stale_key = exchange.key("mapped", info.rank);
  sequence.is_open = false;
  std::string text;
  for (int rank = 0; rank < info.world_size; ++rank) {
    if (!failures[rank].empty()) {
      text += (text.empty() ? "rank " : "; rank ") + std::to_string(rank) + ": " + failures[rank];
    }
  }
  if (!text.empty()) {
    throw Error("rendezvous over group '" + shown(group) + "': " + text);
  }
  return shared;
}

void HostSymmetricMemory::check(int peer, int channel) const {
  const size_t channels = shared_->own->pad_bytes() / (sizeof(uint32_t) * shared_->world_size);
  if (channel < 0 || static_cast<size_t>(channel) >= channels) {
    throw Error("channel " + std::to_string(channel) + " does not exist: the signal pad has " +
                std::to_string(channels) + " channels for " + std::to_string(shared_->world_size) + " ranks");
  }
  if (peer < 0 || peer >= shared_->world_size) {
    throw Error("rank " + std::to_string(peer) + " is not in 0.." + std::to_string(shared_->world_size - 1));
  }
}

// The signal of rank s to rank d is word [channel, s] of d's pad: not zero while it is on its way. Both ends change it
// by compare-and-swap, so pads are zero again when nobody waits, and no signal overtakes another.
std::atomic<uint32_t>* HostSymmetricMemory::signal(int pad_of, int channel, int slot) const {
  return static_cast<std::atomic<uint32_t>*>(shared_->pads[pad_of]) +
      static_cast<size_t>(channel) * shared_->world_size + slot;
}

// swap(&seen): whether the word could be changed; else what it was.
template <typename Swap>
void HostSymmetricMemory::exchange_signal(
    const char* what, std::atomic<uint32_t>* word, int peer, const Swap& swap, size_t timeout_ms) {
  uint32_t seen = 0;
  if (!swap(&seen)) {
    WithoutGil without_gil;
    const double timeout_s = timeout_ms > 0 ? static_cast<double>(timeout_ms) / 1000 : default_timeout_s();
    const Waiter waiter{what, shared_->group, shared_->rank, timeout_s, shared_->world_size};
    Backoff backoff(waiter);
    while (!swap(&seen)) {
      const bool dead = backoff.is_time_to_look() && has_ended(shared_->buffers[peer]);
      if (dead || !backoff.pause(word, seen)) {
        if (swap(&seen)) {
          break;
        }
        const std::string detail = seen == 0 ? "no signal has come" : "the signal before was not taken";
        throw Timeout(describe_timeout(waiter, peer, shared_->buffers[peer], detail, backoff.seconds()));
      }
    }
  }
  wake(word);
}

void HostSymmetricMemory::put(const char* what, int channel, int peer, uint32_t token, size_t timeout_ms) {
  auto* word = signal(peer, channel, shared_->rank);
  exchange_signal(
      what, word, peer,
      [&](uint32_t* seen) {
        *seen = 0;
        return word->compare_exchange_strong(*seen, token, std::memory_order_acq_rel, std::memory_order_relaxed);
      },
      timeout_ms);
}

uint32_t HostSymmetricMemory::take(const char* what, int channel, int peer, size_t timeout_ms) {
  auto* word = signal(shared_->rank, channel, peer);
  uint32_t token = 0;
  exchange_signal(
      what, word, peer,
      [&](uint32_t* seen) {
        token = *seen = word->load(std::memory_order_relaxed);
        return token != 0 &&
            word->compare_exchange_strong(token, 0, std::memory_order_acq_rel, std::memory_order_relaxed);
      },
      timeout_ms);
  return token;
}

void HostSymmetricMemory::put_signal(int dst_rank, int channel, size_t timeout_ms) {
  check(dst_rank, channel);
  put("put_signal", channel, dst_rank, 1, timeout_ms);
}

void HostSymmetricMemory::wait_signal(int src_rank, int channel, size_t timeout_ms) {
  check(src_rank, channel);
  take("wait_signal", channel, src_rank, timeout_ms);
}

void HostSymmetricMemory::barrier(int channel, size_t timeout_ms, uint32_t token) {
  check(0, channel);
  if (shared_->is_broken) {
    throw Error("barrier: this memory of group '" + shared_->group +
                "' can no longer be used: an earlier barrier of this rank failed or was interrupted");
  }
  try {
    meet_all(channel, timeout_ms, token);
  } catch (...) {
    // Its signals are out: the peers would take the next barrier's for this one's.
    shared_->is_broken = true;
    throw;
  }
}

void HostSymmetricMemory::meet_all(int channel, size_t timeout_ms, uint32_t token) {
  const int rank = shared_->rank;
  for (int peer = 0; peer < shared_->world_size; ++peer) {
    if (peer != rank) {
      put("barrier", channel, peer, token, timeout_ms);
    }
  }
  std::string others;
  for (int peer = 0; peer < shared_->world_size; ++peer) {
    if (peer != rank && take("barrier", channel, peer, timeout_ms) != token) {
      others += (others.empty() ? "rank " : ", rank ") + std::to_string(peer);
    }
  }
  if (!others.empty()) {
    throw Divergence("barrier: rank " + std::to_string(rank) + " of group '" + shared_->group + "' met " + others +
                     " with another tensor");
  }
}

} // namespace symmpatterns
