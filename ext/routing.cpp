// Counting sort of the routes.
#include "routing.h"

#include <algorithm>
#include <stdexcept>

#include "kernels.h"
#include "text.h"

namespace kjax {

void Routing::build(const int32_t* idx, int64_t tokens_in, int64_t per_token, int experts) {
  count_.assign(experts, 0);
  tokens = 0;
  for (int64_t t = 0; t < tokens_in; ++t) {
    bool any = false;
    for (int64_t k = 0; k < per_token; ++k) {
      const int32_t e = idx[t * per_token + k];
      if (e == -1) continue;
      if (e < 0 || e >= experts)
        throw std::invalid_argument(
            text("idx[", t, ", ", k, "] = ", e, " is neither -1 (no expert) nor an expert in 0..", experts - 1));
      ++count_[e];
      any = true;
    }
    tokens += any;
  }
  // Descending, so that no small expert holds a column block that a large one waits for.
  order_.clear();
  idle.clear();
  for (int e = 0; e < experts; ++e) (count_[e] ? order_ : idle).push_back(e);
  std::sort(order_.begin(), order_.end(),
            [&](int a, int b) { return count_[a] != count_[b] ? count_[a] > count_[b] : a < b; });

  segments.clear();
  pieces.clear();
  start_.assign(experts, 0);
  int64_t first = 0;
  for (int e : order_) {
    start_[e] = first;
    // Equal parts, in whole tiles of every kernel (multiples of 96: 6 rows, 32 rows) but for the last.
    const int64_t parts = (count_[e] + kMaxRows - 1) / kMaxRows, even = (count_[e] + parts - 1) / parts;
    const int64_t size = parts == 1 ? even : std::min(kMaxRows, (even + 95) / 96 * 96);
    for (int64_t done = 0; done < count_[e]; done += size) {
      const int64_t rows = std::min(size, count_[e] - done);
      for (int64_t row = 0; row < rows; row += kRowTile)
        pieces.push_back({static_cast<int32_t>(segments.size()), row, std::min(kRowTile, rows - row)});
      segments.push_back({e, first + done, rows});
    }
    first += count_[e];
  }
  token.resize(first);
  place.resize(first);
  for (int64_t t = 0; t < tokens_in; ++t)
    for (int64_t k = 0; k < per_token; ++k)
      if (const int32_t e = idx[t * per_token + k]; e >= 0) {
        token[start_[e]] = static_cast<int32_t>(t);
        place[start_[e]++] = t * per_token + k;
      }
}

void Routing::divide(int64_t rows) {
  const auto tiles = [](const Segment& s) { return (s.rows + kRowTile - 1) / kRowTile; };
  int64_t all = 0, largest = 0;
  for (const Segment& s : segments) {
    all += tiles(s) * kRowTile;
    largest = std::max(largest, tiles(s) * kRowTile);
  }
  const int64_t room = all <= rows ? all : std::max(rows / kGroups / kRowTile * kRowTile, largest);
  groups.clear();
  int64_t used = 0, piece = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(segments.size()); ++i) {
    Segment& s = segments[i];
    if (groups.empty() || used + tiles(s) * kRowTile > room) {
      groups.push_back({i, i, piece, piece});
      used = 0;
    }
    const int64_t group = static_cast<int64_t>(groups.size()) - 1;
    s.slot = group % kGroups * room + used;
    s.after = group < kGroups ? 0 : groups[group - kGroups].end;
    used += tiles(s) * kRowTile;
    piece += tiles(s);
    groups.back().end = i + 1;
    groups.back().end_piece = piece;
  }
  slots = std::min(kGroups, static_cast<int64_t>(groups.size())) * room + kRowTile;
}

}  // namespace kjax
