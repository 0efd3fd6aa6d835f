// The list of mapped ranges, and the signal handler over it.
#include "mapped.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "text.h"

namespace kjax {

// Nodes of the list are never freed, because a handler may be walking it; a closed file's node serves another one.
struct Range {
  std::atomic<uintptr_t> begin{0}, end{0};  // whole pages; no end: free
  std::atomic<uintptr_t> lost{0};           // from here on to `end` zeros stand in; 0: nothing lost
  Range* next = nullptr;
  std::string path;
  size_t size = 0;
  int file = -1;
};

namespace {

std::mutex mutex;
std::atomic<Range*> ranges{nullptr};
std::atomic<bool> any_lost{false};
std::atomic<bool> passed_on{false};  // a fault that is not ours went to `previous`, which may hand it back
struct sigaction previous;
const uintptr_t page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));

Range* range_of(uintptr_t address) {
  for (Range* range = ranges.load(std::memory_order_acquire); range; range = range->next) {
    // Another file may take the node meanwhile: both ends have to be of the same one.
    const uintptr_t end = range->end.load();
    if (address < end && address >= range->begin.load() && range->end.load() == end) return range;
  }
  return nullptr;
}

// Runs inside the signal handler: system calls and atomics only.
bool replace_by_zeros(uintptr_t address) {
  Range* const range = range_of(address);
  if (!range) return false;
  const uintptr_t page = address & ~(page_size - 1), end = range->end.load();
  if (mmap(reinterpret_cast<void*>(page), end - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
      MAP_FAILED)
    return false;
  uintptr_t lost = range->lost.load();
  while ((lost == 0 || page < lost) && !range->lost.compare_exchange_weak(lost, page)) {
  }
  any_lost.store(true);
  return true;
}

void on_fault(int signal, siginfo_t* info, void*) {
  const int error = errno;
  const bool fault = info->si_code > 0;  // not sent by kill() or raise()
  if (fault && replace_by_zeros(reinterpret_cast<uintptr_t>(info->si_addr))) {
    errno = error;
    return;
  }
  // Not ours: the instruction, or the signal, comes again under the handler that was there before.
  struct sigaction standard = {};
  standard.sa_handler = SIG_DFL;
  sigaction(signal, passed_on.exchange(true) ? &standard : &previous, nullptr);
  if (!fault) raise(signal);
  errno = error;
}

// What is wrong with a range that has lost something.
std::string problem(const Range& range) {
  struct stat status;
  const bool known = fstat(range.file, &status) == 0;
  const int error = errno;
  const size_t now = known ? static_cast<size_t>(status.st_size) : 0;
  return text(range.path, ": cannot be read at byte ", range.lost.load() - range.begin.load(), ": ",
              !known             ? std::string(std::strerror(error))
              : now < range.size ? text("it has ", now, " bytes now and had ", range.size, " when it was opened")
                                 : std::string("its disk fails"));
}

[[noreturn]] void tell(const std::string& problems) {
  throw FileLost(problems + "; put the file back as it was and go on, or open the model again");
}

// Maps what a range has lost again; false where the file is beyond that (another took its place on a server, say) and
// the zeros stay. It is mapped elsewhere first, so that its addresses are never free for others to take.
bool map_again(Range& range) {
  const uintptr_t lost = range.lost.load(), begin = range.begin.load(), end = range.end.load();
  void* const data = mmap(nullptr, end - lost, PROT_READ, MAP_SHARED, range.file, static_cast<off_t>(lost - begin));
  if (data == MAP_FAILED) return false;
  range.lost.store(0);
  if (mremap(data, end - lost, end - lost, MREMAP_MAYMOVE | MREMAP_FIXED, reinterpret_cast<void*>(lost)) != MAP_FAILED)
    return true;
  munmap(data, end - lost);
  range.lost.store(lost);
  return false;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const auto fail = [&](const char* what) { throw FileLost(text(path, ": ", what, " (", std::strerror(errno), ")")); };
  std::lock_guard lock(mutex);
  range_ = ranges.load();
  while (range_ && range_->end.load()) range_ = range_->next;
  if (!range_) {
    range_ = new Range;
    range_->next = ranges.load();
    ranges.store(range_, std::memory_order_release);
  }
  range_->path = path;
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail("cannot be opened");
  struct stat status;
  void* data = MAP_FAILED;
  if (fstat(file, &status) == 0) {
    errno = EINVAL;  // of an empty file, as mmap would say
    if (status.st_size > 0) data = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_SHARED, file, 0);
  }
  if (data == MAP_FAILED) {
    const int error = errno;
    close(file);
    errno = error;
    fail("cannot be mapped");
  }
  range_->size = static_cast<size_t>(status.st_size);
  range_->file = file;
  range_->begin.store(reinterpret_cast<uintptr_t>(data));
  range_->end.store(reinterpret_cast<uintptr_t>(data) + (range_->size + page_size - 1) / page_size * page_size);
}

MappedFile::~MappedFile() {
  std::lock_guard lock(mutex);
  const uintptr_t begin = range_->begin.load(), end = range_->end.load();
  range_->end.store(0);  // first: with another begin the range would hold addresses of others
  range_->lost.store(0);
  close(range_->file);
  munmap(reinterpret_cast<void*>(begin), end - begin);
}

const uint8_t* MappedFile::data() const { return reinterpret_cast<const uint8_t*>(range_->begin.load()); }
size_t MappedFile::size() const { return range_->size; }

void MappedFile::require_whole() const {
  if (!range_->lost.load()) return;
  std::lock_guard lock(mutex);
  const std::string found = problem(*range_);
  if (!map_again(*range_)) tell(found);
}

bool file_lost() { return any_lost.load(std::memory_order_relaxed); }

void watch_files() {
  if (!ranges.load(std::memory_order_acquire)) return;
  std::lock_guard lock(mutex);
  any_lost.store(false);
  struct sigaction now;
  sigaction(SIGBUS, nullptr, &now);
  if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault) return;
  previous = now;
  passed_on.store(false);
  struct sigaction ours = {};
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

void require_files() {
  if (!any_lost.exchange(false)) return;
  std::lock_guard lock(mutex);
  std::string problems;
  for (Range* range = ranges.load(); range; range = range->next) {
    if (!range->lost.load()) continue;
    problems += text(problems.empty() ? "" : "; ", problem(*range));
    map_again(*range);  // where it fails, require_whole() refuses the next call
  }
  if (problems.empty())
    throw FileLost("a mapped file was lost and is closed since: what read it has stopped; call again");
  tell(problems);
}

void read_ahead(const uint8_t* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const Range* const range = range_of(address);
  if (!range) return;  // resident memory
  const off_t first = static_cast<off_t>(address - range->begin.load());
  // A strip of experts is read and dropped as a whole, so few bytes tell for all. Asking for one makes the kernel read
  // the pages around it, and on busy cores they are often there before it answers, a quarter of the time with two
  // programs to a core: several are asked, and others each time.
  static std::atomic<uint32_t> turn{0};
  constexpr uint32_t kPlaces = 64, kStride = 37;  // no common divisor: every place has its turn, neighbours far apart
  const auto cached = [&] {
    const uint32_t place = turn.fetch_add(kStride, std::memory_order_relaxed) % kPlaces;
    char byte;
    const iovec one{&byte, 1};
    const off_t at = first + static_cast<off_t>((2 * place + 1) * bytes / (2 * kPlaces));
    return preadv2(range->file, &one, 1, at, RWF_NOWAIT) != -1 || errno != EAGAIN;
  };
  if (cached() && cached() && cached()) return;
  constexpr size_t kPiece = size_t{1} << 20;  // the kernel cuts one request to its largest read, often no more
  for (size_t done = 0; done < bytes; done += kPiece)
    posix_fadvise(range->file, first + static_cast<off_t>(done), static_cast<off_t>(std::min(kPiece, bytes - done)),
                  POSIX_FADV_WILLNEED);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace kjax
