// Which tokens each expert gets: routes sorted by expert, experts by descending number of rows, in groups that have
// their operand rows in memory at a time.
#pragma once
#include <cstdint>
#include <vector>

namespace kjax {

// Rows of one expert that are multiplied together: at most kMaxRows, so a busy expert has several.
struct Segment {
  int expert;
  int64_t first, rows;  // routes [first, first + rows)
  int64_t slot = 0;     // its first operand row: segments start at multiples of kRowTile
  int64_t after = 0;    // segments [0, after) have to be done before its rows are written: some had its slots
};

// Rows of a segment that are gathered together: [row, row + rows), row a multiple of kRowTile.
struct Piece {
  int32_t segment;
  int64_t row, rows;
};

constexpr int64_t kGroups = 3;  // that have rows at a time: one is gathered, one multiplied first and one last (pass.h)

// Segments [first, end) and their pieces.
struct Group {
  int64_t first, end, first_piece, end_piece;
};

struct Routing {
  std::vector<Segment> segments;
  std::vector<int32_t> token;  // [routes]
  std::vector<int64_t> place;  // [routes], where in idx and gate the route stands
  std::vector<Piece> pieces;
  std::vector<Group> groups;  // by divide()
  std::vector<int> idle;      // experts without routes
  int64_t slots = 0;   // operand rows that exist at a time, and kRowTile more that a kernel may read; by divide()
  int64_t tokens = 0;  // those with at least one expert

  // Rebuilds from idx [tokens, per_token]; throws when one is neither -1 nor an expert. A function of idx alone.
  void build(const int32_t* idx, int64_t tokens, int64_t per_token, int experts);
  // Gives the segments slots, at most `rows` of them or kGroups of the largest segment: where that is too little for
  // all, groups of segments take equal parts of the slots in turns.
  void divide(int64_t rows);
  int64_t routes() const { return static_cast<int64_t>(token.size()); }

 private:
  std::vector<int64_t> count_, start_;
  std::vector<int> order_;
};

}  // namespace kjax
