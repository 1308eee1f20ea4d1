// Memory that other processes of this host can map: an anonymous file (memfd) of this process.
//
// It has no name in any file system, so nothing is left behind when a process is killed, and only processes of the
// same user that know pid and descriptor can open it (through /proc/<pid>/fd/<fd>).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "process.h"

namespace symmpatterns {

// What a peer needs to find a segment, and to be sure that it found the right one.
struct Descriptor {
  std::string host;
  ProcessId process;
  int fd = -1;
  uint64_t device = 0;
  uint64_t inode = 0;
  uint32_t user = 0;
  size_t data_bytes = 0;
  size_t pad_bytes = 0;

  std::string serialize() const;
  static Descriptor parse(const std::string& text);
};

// Layout: the data from a page boundary on, then the signal pad from the next one on.
class Segment {
 public:
  // With all its pages present; the pad is zero, the data is not initialised. Throws Error when memory is lacking.
  static std::shared_ptr<Segment> create(size_t data_bytes, size_t pad_bytes);
  // Keeps a dead segment for create(), which is a thousand times faster then, if nobody else can have it mapped.
  static void recycle(std::shared_ptr<Segment> segment);
  // Gives back the memory that recycle() keeps.
  static void trim();
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  char* data() const { return base_; }
  char* pad() const;
  size_t data_bytes() const { return data_bytes_; }
  size_t pad_bytes() const { return pad_bytes_; }
  // Once peers know the segment it is never recycled.
  Descriptor publish();

 private:
  Segment() = default;
  static std::shared_ptr<Segment> make(size_t data_bytes, size_t pad_bytes);

  bool is_published_ = false;
  uint64_t generation_ = 0; // of this process: a fork shares all segments that exist
  char* base_ = nullptr;
  size_t data_bytes_ = 0;
  size_t pad_bytes_ = 0;
  int fd_ = -1;
};

// A peer's segment, mapped here; stays valid when the peer frees its own mapping or dies.
class PeerMapping {
 public:
  explicit PeerMapping(const Descriptor& descriptor);
  ~PeerMapping();
  PeerMapping(const PeerMapping&) = delete;
  PeerMapping& operator=(const PeerMapping&) = delete;

  char* data() const { return base_; }
  char* pad() const;

 private:
  char* base_ = nullptr;
  size_t data_bytes_ = 0;
  size_t total_bytes_ = 0;
};

int64_t live_segments(); // segments in use in this process
int64_t mapped_bytes(); // bytes of own and peers' segments mapped into this process

} // namespace symmpatterns
