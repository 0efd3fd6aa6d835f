// Error messages in one expression: text("expert store ", id, " is closed").
#pragma once
#include <sstream>
#include <string>

namespace kjax {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace kjax
