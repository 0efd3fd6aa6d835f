// Mapped checkpoint files whose loss is an error, not the end of the process.
//
// Reading a mapped page that the file no longer has, or that its disk cannot deliver, raises SIGBUS. The handler here
// replaces the rest of the mapping by zeros, so that the reader goes on, and the call that read them then throws
// FileLost and maps the file again: a file made whole serves the next call. One that cannot be mapped any more is told
// by every call over its store, and by no other. Addresses outside mapped checkpoints go to whatever handled SIGBUS
// before (Python's faulthandler, say).
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace kjax {

struct FileLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class MappedFile {
 public:
  explicit MappedFile(const std::string& path);  // throws FileLost where it cannot be opened or mapped
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  const uint8_t* data() const;
  size_t size() const;
  // Before it is read, while nobody reads it: throws FileLost where zeros stand in for what cannot be mapped again.
  void require_whole() const;

 private:
  struct Range* range_;
};

// Whether a mapped file was lost since watch_files(); cheap enough to ask between tasks.
bool file_lost();
// Before mapped files are read: the handler is in place, also when somebody installed another one since.
void watch_files();
// After they were read, while nobody reads them: throws FileLost naming the file if one was lost since watch_files(),
// for then threads have stopped in the middle.
void require_files();

// Starts reading [data, data + bytes) of a mapped file ahead where it is not in the page cache. Faults alone would read
// it in pieces of a read-ahead window, each waited for.
void read_ahead(const uint8_t* data, size_t bytes);

}  // namespace kjax
