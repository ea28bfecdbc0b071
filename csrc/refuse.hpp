// Refusal of invalid input: std::invalid_argument, which the bindings translate to Python's ValueError.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace efface {

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

inline std::string quoted(std::string_view name) { return std::string("`").append(name).append("`"); }

}  // namespace efface
