// The units of a step, and their sorting for best-fit decreasing.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "packer.hpp"

namespace efface {

// Sequences that are placed in the same micro-batch: a forget sequence with its alternate, or a retain sequence.
struct Unit {
    Role role;
    std::int64_t sequence;
    std::int64_t tokens;
};

using UnitIndex = std::uint32_t;

// Sorts indices by descending number of tokens; the sort is stable. It is a radix sort, because half of the branches of
// a comparison sort would be mispredicted.
class LongestFirst {
  public:
    void operator()(std::vector<UnitIndex>& order, const std::vector<Unit>& units) {
        std::int64_t top = 0;
        std::int64_t bottom = std::numeric_limits<std::int64_t>::max();
        for (const UnitIndex unit : order) {
            top = std::max(top, units[unit].tokens);
            bottom = std::min(bottom, units[unit].tokens);
        }
        other_.resize(order.size());
        for (int shift = 0; shift < 64 && ((top - bottom) >> shift) > 0; shift += 8) {
            std::array<UnitIndex, 257> starts{};
            const auto digit = [&](UnitIndex unit) {
                return static_cast<std::size_t>((top - units[unit].tokens) >> shift) & 255U;
            };
            for (const UnitIndex unit : order) {
                ++starts[digit(unit) + 1];
            }
            std::partial_sum(starts.begin(), starts.end(), starts.begin());
            for (const UnitIndex unit : order) {
                other_[starts[digit(unit)]++] = unit;
            }
            std::swap(order, other_);
        }
    }

  private:
    std::vector<UnitIndex> other_;
};

}  // namespace efface
