// Mapped files whose pages have to come from the disk, one that is lost and cannot be mapped again, and one that is
// lost while another closes.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "mapped.h"
#include "robust_data.h"
#include "robust_memory.h"

namespace kjax {
namespace {

constexpr size_t kBytes = size_t{8} << 20;

// A file of its own under the working directory, gone with this.
class File {
 public:
  File() {
    descriptor_ = mkstemp(path_.data());
    const std::vector<char> bytes(kBytes, 1);
    if (descriptor_ < 0 || write(descriptor_, bytes.data(), kBytes) != static_cast<ssize_t>(kBytes) ||
        fsync(descriptor_))
      throw std::runtime_error("robust: no file can be written here");
  }
  ~File() {
    close(descriptor_);
    unlink(path_.c_str());
  }
  const std::string& path() const { return path_; }
  bool shorten(size_t bytes) const { return ftruncate(descriptor_, static_cast<off_t>(bytes)) == 0; }
  void drop() const { posix_fadvise(descriptor_, 0, 0, POSIX_FADV_DONTNEED); }
  bool read_middle() const {
    char byte;
    return pread(descriptor_, &byte, 1, kBytes / 2) == 1;
  }

 private:
  std::string path_ = "kjax_robust_XXXXXX";
  int descriptor_;
};

// How much of a mapping is in the page cache; asking by reading would bring it there.
size_t cached(const MappedFile& file) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages(kBytes / page);
  if (mincore(const_cast<uint8_t*>(file.data()), kBytes, pages.data())) throw std::runtime_error("mincore");
  return page * static_cast<size_t>(std::count_if(pages.begin(), pages.end(), [](unsigned char p) { return p & 1; }));
}

std::string lost() {
  try {
    require_files();
  } catch (const FileLost& error) {
    return error.what();
  }
  return "";
}

bool refused(const MappedFile& file) {
  try {
    file.require_whole();
  } catch (const FileLost&) {
    return true;
  }
  return false;
}

// Whether a call that stopped because of a file that is closed by its end says so, and only that call.
bool closing_is_told() {
  const File file;
  std::optional<MappedFile> closes(file.path());
  const volatile uint8_t* const first = closes->data();
  watch_files();
  if (!file.shorten(0) || *first) return false;
  closes.reset();
  return lost().find("closed since") != std::string::npos && lost().empty();
}

// Whether a file that is lost while another one, mapped later and above it, closes is the one that is named.
bool closing_tells_which() {
  static const volatile uint8_t* reads;
  const File below, above;
  void* const place = mmap(nullptr, 4 * kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const MappedFile stays(below.path());
  munmap(place, 4 * kBytes);
  std::optional<MappedFile> closes(above.path());
  if (closes->data() < stays.data()) throw std::runtime_error("robust: files are mapped in another order");
  reads = stays.data();
  if (!below.shorten(0)) return false;
  while_unmapping = [] { static_cast<void>(*reads); };
  closes.reset();
  while_unmapping = nullptr;
  const std::string said = lost();
  return said.find(below.path()) != std::string::npos && said.find(above.path()) == std::string::npos;
}

}  // namespace

int files() {
  const File file;
  const MappedFile mapped(file.path());
  watch_files();
  file.drop();
  const bool some = file.read_middle();  // what is cached in one place does not speak for the rest
  const size_t before = cached(mapped);
  size_t after = before;
  for (int i = 0; i < 300 && after < kBytes; ++i) {
    read_ahead(mapped.data(), kBytes);  // again: a page may be there by its being asked for (mapped.cpp)
    for (int wait = 0; wait < 10 && (after = cached(mapped)) < kBytes; ++wait)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  const bool good = some && after == kBytes;

  // Lost, and refused when it is to be mapped again: those who need it are told each time, until it can be.
  const volatile uint8_t* const last = mapped.data() + kBytes - 1;
  bool told = file.shorten(0) && *last == 0;
  refuse_files = true;
  told = told && !lost().empty();
  for (int call = 0; call < 2; ++call) told = told && refused(mapped) && lost().empty() && *last == 0;
  refuse_files = false;
  told = told && !refused(mapped) && lost().empty() && *last == 0 && !lost().empty();
  told = told && file.shorten(kBytes) && *last == 0 && lost().empty();
  const bool named = closing_tells_which() && closing_is_told();
  std::printf(
      "files: %.1f MB cached, after asking %.1f%s; a lost file that cannot be mapped again %s, one lost while "
      "another closes %s\n",
      1e-6 * before, 1e-6 * after, good ? "" : ": WRONG", told ? "is told by every call" : "IS FORGOTTEN",
      named ? "is named" : "IS NOT NAMED");
  return !(good && told && named);
}

}  // namespace kjax
