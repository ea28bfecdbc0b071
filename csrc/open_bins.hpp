// Best-fit: the open bins of a packing, found by the room that they have left.
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

// The micro-batches that still have room, for best-fit: put and take cost a few instructions, however many there are.
//
// Rooms fall into at most 2^16 classes, each a stack, and a bit set says which are not empty. A class is one room where
// no sequence has more than 2^16 tokens; for longer ones it is a range of rooms, and best-fit is best to within that
// range.
class OpenBins {
  public:
    OpenBins() : heads_(classes, nobody), words_(classes / 64), summary_(classes / 4096) {}

    // For sequences of up to `longest_unit` tokens. A bin with more room than that is kept apart: there is one at most,
    // the newest, because a new one is opened only where no other has room.
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

    // Takes out the fullest bin with room for `tokens` (and says how much room it has), or nobody.
    BinIndex take(std::int64_t tokens, std::int64_t& room) {
        auto c = static_cast<std::size_t>(tokens >> shift_);
        // Where a class is a range, its first bin may have too little room; in all later classes every bin fits.
        if (shift_ > 0 && heads_[c] != nobody && rooms_[heads_[c]] < tokens) {
            ++c;
        }
        c = held_ == 0 ? classes : next(c);  // most steps need few micro-batches, and hold none in the classes
        if (c == classes) {
            room = fresh_room_;
            return fresh_ != nobody && fresh_room_ >= tokens ? std::exchange(fresh_, nobody) : nobody;
        }
        const BinIndex bin = heads_[c];
        room = rooms_[bin];
        pop(c);
        return bin;
    }

    // Empties the classes again; costs what is in them.
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

    // The first class from c on that is not empty, or `classes`.
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
    std::vector<BinIndex> heads_;  // of each class
    std::vector<BinIndex> below_;  // of each bin, in its class
    std::vector<std::int64_t> rooms_;
    std::vector<std::uint64_t> words_;    // a bit for each class
    std::vector<std::uint64_t> summary_;  // a bit for each word
};

}  // namespace efface
