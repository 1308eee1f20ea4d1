#include "segment.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <list>
#include <mutex>
#include <sstream>

#include "errors.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

namespace symmpatterns {
namespace {

std::atomic<int64_t> segment_count{0};
std::atomic<int64_t> byte_count{0};

constexpr size_t kCheckFrom = size_t(1) << 20; // reading /proc costs more than a smaller allocation

size_t page_bytes() {
  static const size_t value = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return value;
}

size_t round_to_pages(size_t bytes) {
  return (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
}

size_t total_bytes_of(size_t data_bytes, size_t pad_bytes) {
  return round_to_pages(data_bytes) + round_to_pages(pad_bytes);
}

std::string reason(int error) {
  return std::strerror(error);
}

size_t read_number(const std::string& path) {
  std::ifstream file(path);
  size_t value = 0;
  return file >> value ? value : std::numeric_limits<size_t>::max(); // "max", or no such file: no limit known
}

// Bytes that can still be had: the machine's, or what this process's control group leaves.
size_t available_bytes() {
  size_t available = std::numeric_limits<size_t>::max();
  std::ifstream meminfo("/proc/meminfo");
  std::string name;
  size_t kibibytes = 0;
  while (meminfo >> name >> kibibytes) {
    if (name == "MemAvailable:") {
      available = kibibytes * 1024;
      break;
    }
    meminfo.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    if (line.rfind("0::", 0) == 0) {
      const std::string folder = "/sys/fs/cgroup" + line.substr(3);
      const size_t limit = read_number(folder + "/memory.max");
      const size_t used = read_number(folder + "/memory.current");
      if (limit != std::numeric_limits<size_t>::max() && used != std::numeric_limits<size_t>::max()) {
        available = std::min(available, limit > used ? limit - used : 0);
      }
    }
  }
  return available;
}

[[noreturn]] void fail_to_allocate(size_t wanted, const std::string& why) {
  const size_t available = available_bytes();
  throw Error(
      "cannot allocate " + std::to_string(wanted) + " bytes of symmetric memory: " + why + " (about " +
      std::to_string(available) + " bytes are available on this host)");
}

int create_file() {
  constexpr unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  int fd = memfd_create("symmpatterns", flags | MFD_NOEXEC_SEAL);
  if (fd < 0 && errno == EINVAL) { // before Linux 6.3
    fd = memfd_create("symmpatterns", flags);
  }
  if (fd >= 0 && fchmod(fd, S_IRUSR | S_IWUSR) != 0) { // it is made with mode 0777 or 0666
    const int error = errno;
    close(fd);
    errno = error;
    return -1;
  }
  return fd;
}

char* map(int fd, size_t bytes) {
  // The pages exist already; populating the page table now costs less than a fault a page later.
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  return address == MAP_FAILED ? nullptr : static_cast<char*>(address);
}

} // namespace

std::string Descriptor::serialize() const {
  std::ostringstream text;
  text << host << ' ' << process.pid << ' ' << process.start_time << ' ' << fd << ' ' << device << ' ' << inode << ' '
       << user << ' ' << data_bytes << ' ' << pad_bytes;
  return text.str();
}

Descriptor Descriptor::parse(const std::string& text) {
  std::istringstream fields(text);
  Descriptor d;
  fields >> d.host >> d.process.pid >> d.process.start_time >> d.fd >> d.device >> d.inode >> d.user >> d.data_bytes >>
      d.pad_bytes;
  if (!fields) {
    throw Error("a peer published a segment that this version of symmpatterns cannot read: '" + text + "'");
  }
  return d;
}

namespace {

// Segments that are not in use, the latest first. An allocation of the same number of pages takes one of them: making a
// segment costs a system call a page, which is what a program would pay again and again that makes symmetric tensors
// in a loop.
struct Spares {
  static constexpr size_t kMostSegments = 64;
  static constexpr size_t kMostBytes = size_t(256) << 20;

  std::mutex mutex;
  std::list<std::shared_ptr<Segment>> segments;
  size_t bytes = 0;
  std::atomic<uint64_t> generation{0};

  Spares() {
    // Parent and child share every segment that exists at a fork, so neither may use one of them for something new.
    static Spares* self = this;
    const auto bump = [] { ++self->generation; };
    pthread_atfork(nullptr, bump, bump);
  }
};

Spares& spares() {
  static auto* instance = new Spares; // never destroyed, for the reason that the registry of host_memory.cpp is not
  return *instance;
}

size_t total_bytes_of(const Segment& segment) {
  return total_bytes_of(segment.data_bytes(), segment.pad_bytes());
}

} // namespace

std::shared_ptr<Segment> Segment::create(size_t data_bytes, size_t pad_bytes) {
  data_bytes = std::max<size_t>(data_bytes, 1); // an empty tensor has an address of its own too
  {
    std::lock_guard<std::mutex> lock(spares().mutex);
    auto& list = spares().segments;
    for (auto spare = list.begin(); spare != list.end(); ++spare) {
      if ((*spare)->generation_ == spares().generation && (*spare)->pad_bytes_ == pad_bytes &&
          round_to_pages((*spare)->data_bytes_) == round_to_pages(data_bytes)) {
        auto segment = std::move(*spare);
        list.erase(spare);
        spares().bytes -= total_bytes_of(*segment);
        segment->data_bytes_ = data_bytes;
        return segment;
      }
    }
  }
  try {
    return make(data_bytes, pad_bytes);
  } catch (const Error&) {
    if (spares().bytes == 0) {
      throw;
    }
  }
  trim(); // what is kept for others may be what is lacking
  return make(data_bytes, pad_bytes);
}

void Segment::recycle(std::shared_ptr<Segment> segment) {
  const size_t total = total_bytes_of(*segment);
  std::list<std::shared_ptr<Segment>> dead; // unmapped after the lock is given back
  std::lock_guard<std::mutex> lock(spares().mutex);
  auto& list = spares().segments;
  if (segment.use_count() > 1 || segment->is_published_ || segment->generation_ != spares().generation ||
      total > Spares::kMostBytes / 2) {
    dead.push_back(std::move(segment));
    return;
  }
  list.push_front(std::move(segment));
  spares().bytes += total;
  while (list.size() > Spares::kMostSegments || spares().bytes > Spares::kMostBytes) {
    spares().bytes -= total_bytes_of(*list.back());
    dead.splice(dead.end(), list, std::prev(list.end()));
  }
}

void Segment::trim() {
  std::list<std::shared_ptr<Segment>> dead;
  std::lock_guard<std::mutex> lock(spares().mutex);
  dead.swap(spares().segments);
  spares().bytes = 0;
}

std::shared_ptr<Segment> Segment::make(size_t data_bytes, size_t pad_bytes) {
  if (data_bytes > std::numeric_limits<size_t>::max() / 4) {
    fail_to_allocate(data_bytes, "the size is out of range");
  }
  const size_t total = total_bytes_of(data_bytes, pad_bytes);
  if (total >= kCheckFrom && total > available_bytes()) {
    fail_to_allocate(data_bytes, "not enough memory");
  }
  std::shared_ptr<Segment> segment(new Segment);
  segment->data_bytes_ = data_bytes;
  segment->pad_bytes_ = pad_bytes;
  segment->generation_ = spares().generation;
  ++segment_count; // from here on the destructor undoes what was done
  segment->fd_ = create_file();
  if (segment->fd_ < 0) {
    const int error = errno;
    fail_to_allocate(
        data_bytes,
        "memfd_create: " + reason(error) +
            (error == EMFILE ? "; each symmetric tensor takes a file descriptor, so raise `ulimit -n`" : ""));
  }
  if (ftruncate(segment->fd_, static_cast<off_t>(total)) != 0) {
    fail_to_allocate(data_bytes, "ftruncate: " + reason(errno));
  }
  // All pages now: a shortage is an error here instead of a SIGBUS in somebody's kernel later.
  if (const int error = posix_fallocate(segment->fd_, 0, static_cast<off_t>(total)); error != 0) {
    fail_to_allocate(data_bytes, "posix_fallocate: " + reason(error));
  }
  if (fcntl(segment->fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    fail_to_allocate(data_bytes, "sealing the memory: " + reason(errno));
  }
  segment->base_ = map(segment->fd_, total);
  if (segment->base_ == nullptr) {
    fail_to_allocate(data_bytes, "mmap: " + reason(errno));
  }
  byte_count += static_cast<int64_t>(total);
  return segment;
}

Segment::~Segment() {
  if (base_ != nullptr) {
    const size_t total = total_bytes_of(data_bytes_, pad_bytes_);
    munmap(base_, total);
    byte_count -= static_cast<int64_t>(total);
  }
  if (fd_ >= 0) {
    close(fd_);
  }
  --segment_count;
}

char* Segment::pad() const {
  return base_ + round_to_pages(data_bytes_);
}

Descriptor Segment::publish() {
  is_published_ = true;
  struct stat info{};
  if (fstat(fd_, &info) != 0) {
    throw Error("fstat of a symmetric segment: " + reason(errno));
  }
  return {host_identity(), ProcessId::self(), fd_, info.st_dev, info.st_ino, info.st_uid, data_bytes_, pad_bytes_};
}

PeerMapping::PeerMapping(const Descriptor& peer) : data_bytes_(peer.data_bytes) {
  const std::string owner = "process " + std::to_string(peer.process.pid);
  if (peer.host != host_identity()) {
    throw Error(owner + " runs on another host or in another PID namespace: the ranks are not on one host");
  }
  const std::string path = "/proc/" + std::to_string(peer.process.pid) + "/fd/" + std::to_string(peer.fd);
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) {
    const int error = errno;
    throw Error(
        "cannot open the memory of " + owner + " (" + path + "): " + reason(error) +
        (error == EACCES || error == EPERM ? "; the ranks must run as the same user and be dumpable" : "") +
        (error == ENOENT ? "; it has ended or has freed the memory" : "") +
        (error == EMFILE ? "; raise `ulimit -n`" : ""));
  }
  struct stat info{};
  const int failed = fstat(fd, &info);
  total_bytes_ = total_bytes_of(peer.data_bytes, peer.pad_bytes);
  const bool is_same = failed == 0 && info.st_dev == peer.device && info.st_ino == peer.inode &&
      info.st_uid == peer.user && static_cast<size_t>(info.st_size) == total_bytes_;
  if (!is_same) {
    close(fd);
    throw Error(path + " is not the memory that " + owner + " published: it has ended or has freed the memory");
  }
  if (info.st_uid != geteuid()) {
    close(fd);
    throw Error("the memory of " + owner + " belongs to another user: the ranks must run as the same user");
  }
  base_ = map(fd, total_bytes_);
  const int error = errno;
  close(fd);
  if (base_ == nullptr) {
    throw Error("cannot map " + std::to_string(total_bytes_) + " bytes of " + owner + ": " + reason(error));
  }
  byte_count += static_cast<int64_t>(total_bytes_);
  remember_owner(base_, total_bytes_, peer.process);
}

PeerMapping::~PeerMapping() {
  forget_owner(base_);
  munmap(base_, total_bytes_);
  byte_count -= static_cast<int64_t>(total_bytes_);
}

char* PeerMapping::pad() const {
  return base_ + round_to_pages(data_bytes_);
}

int64_t live_segments() {
  std::lock_guard<std::mutex> lock(spares().mutex);
  return segment_count - static_cast<int64_t>(spares().segments.size());
}

int64_t mapped_bytes() {
  return byte_count;
}

} // namespace symmpatterns
