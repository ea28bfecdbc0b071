// The open bins of a best-fit packing, indexed by their remaining room.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace efface {

using BinIndex = std::uint32_t;

// Micro-batches that still have room, for best-fit. put and take cost a few instructions, independent of the number of
// bins.
//
// Room sizes are divided into at most 2^16 classes. Each class is a stack of bins, and a bit set marks the classes that
// are not empty. If no sequence has more than 2^16 tokens, a class is a single room size. For longer sequences a class
// is a range of sizes, and best-fit is exact up to this range.
class OpenBins {
  public:
    OpenBins() : heads_(classes, nobody), words_(classes / 64), summary_(classes / 4096) {}

    // Prepares for sequences of up to `longest_unit` tokens. A bin with more room than that is stored separately. At
    // most one such bin exists, the newest, because a new bin is opened only if no other bin has enough room.
    void reset(std::int64_t longest_unit) {
        shift_ = std::max(0, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(longest_unit))) - 16);
        limit_ = longest_unit;
        fresh_ = nobody;
    }

    void put(BinIndex bin, std::int64_t room) {
        if (room > limit_) {
            fresh_ = bin;
            fresh_room_ = room;
            return;
        }
        const auto c = static_cast<std::size_t>(room >> shift_);
        if (rooms_.size() <= bin) {
            rooms_.resize(bin + 1);
            below_.resize(bin + 1);
        }
        rooms_[bin] = room;
        below_[bin] = std::exchange(heads_[c], bin);
        words_[c / 64] |= bit(c);
        summary_[c / 4096] |= bit(c / 64);
        ++held_;
    }

    // Removes and returns the fullest bin with room for `tokens`, and sets `room` to its room; or returns `nobody`.
    BinIndex take(std::int64_t tokens, std::int64_t& room) {
        auto c = static_cast<std::size_t>(tokens >> shift_);
        // If a class is a range, its top bin can have too little room. In all later classes every bin has enough.
        if (shift_ > 0 && heads_[c] != nobody && rooms_[heads_[c]] < tokens) {
            ++c;
        }
        c = held_ == 0 ? classes : next(c);  // in most steps the classes are empty
        if (c == classes) {
            room = fresh_room_;
            return fresh_ != nobody && fresh_room_ >= tokens ? std::exchange(fresh_, nobody) : nobody;
        }
        const BinIndex bin = heads_[c];
        room = rooms_[bin];
        pop(c);
        return bin;
    }

    // Empties the classes; the cost is proportional to the number of classes in use.
    void clear() {
        for (std::size_t c = held_ == 0 ? classes : next(0); c != classes; c = next(c)) {
            heads_[c] = nobody;
            forget(c);
        }
        held_ = 0;
    }

    static constexpr BinIndex nobody = std::numeric_limits<BinIndex>::max();

  private:
    static constexpr std::size_t classes = 1 << 16;

    static std::uint64_t bit(std::size_t i) { return std::uint64_t{1} << (i % 64); }

    void pop(std::size_t c) {
        heads_[c] = below_[heads_[c]];
        --held_;
        if (heads_[c] == nobody) {
            forget(c);
        }
    }

    void forget(std::size_t c) {
        words_[c / 64] &= ~bit(c);
        if (words_[c / 64] == 0) {
            summary_[c / 4096] &= ~bit(c / 64);
        }
    }

    // Returns the first class from c on that is not empty, or `classes`.
    [[nodiscard]] std::size_t next(std::size_t c) const {
        if (c >= classes) {
            return classes;
        }
        if (const std::uint64_t rest = words_[c / 64] >> (c % 64); rest != 0) {
            return c + static_cast<std::size_t>(std::countr_zero(rest));
        }
        const std::size_t word = c / 64 + 1;
        for (std::size_t s = word / 64; s < summary_.size(); ++s) {
            const std::uint64_t set = s == word / 64 ? summary_[s] & (~std::uint64_t{0} << (word % 64)) : summary_[s];
            if (set != 0) {
                const std::size_t found = s * 64 + static_cast<std::size_t>(std::countr_zero(set));
                return found * 64 + static_cast<std::size_t>(std::countr_zero(words_[found]));
            }
        }
        return classes;
    }

    int shift_ = 0;
    std::int64_t limit_ = 0;
    BinIndex fresh_ = nobody;
    std::int64_t fresh_room_ = 0;
    std::size_t held_ = 0;         // bins in the classes
    std::vector<BinIndex> heads_;  // top bin of each class, or nobody
    std::vector<BinIndex> below_;  // for each bin, the next bin of its class
    std::vector<std::int64_t> rooms_;
    std::vector<std::uint64_t> words_;    // one bit per class: not empty
    std::vector<std::uint64_t> summary_;  // one bit per word: not zero
};

}  // namespace efface
