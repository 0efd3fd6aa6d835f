// Which tokens each expert gets: routes sorted by expert, experts by descending number of rows.
#pragma once
#include <cstdint>
#include <vector>

namespace kjax {

// Rows of one expert that are multiplied together: at most kMaxRows, so a busy expert has several.
struct Segment {
  int expert;
  int64_t first, rows;  // routes [first, first + rows)
  int64_t slot;         // its first operand row: segments start at multiples of kRowTile
};

// Rows of a segment that are gathered together: [row, row + rows), row a multiple of kRowTile.
struct Piece {
  int32_t segment;
  int64_t row, rows;
};

struct Routing {
  std::vector<Segment> segments;
  std::vector<int32_t> token;  // [routes]
  std::vector<int64_t> place;  // [routes], where in idx and gate the route stands
  std::vector<Piece> pieces;
  std::vector<int> idle;  // experts without routes
  int64_t slots = 0;   // operand rows of all segments, and kRowTile more that a kernel may read
  int64_t tokens = 0;  // those with at least one expert

  // Rebuilds from idx [tokens, per_token]; throws when one is neither -1 nor an expert. A function of idx alone.
  void build(const int32_t* idx, int64_t tokens, int64_t per_token, int experts);
  int64_t routes() const { return static_cast<int64_t>(token.size()); }

 private:
  std::vector<int64_t> count_, start_;
  std::vector<int> order_;
};

}  // namespace kjax
