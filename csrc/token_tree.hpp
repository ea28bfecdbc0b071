// The token tree of a batch: what its sequences share from their first token on is stored once.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "common_prefix.hpp"

namespace efface {

// What a sequence shares. Its first `shared` tokens are stored by earlier sequences; they are the first `shared` tokens
// of sequence `like` too. It stores its other tokens, its *segment*, itself.
struct Branch {
    std::size_t shared = 0;
    std::size_t like = 0;
};

// A radix tree of the sequences in the order of their insertion. A segment is never split: a sequence that leaves it in
// the middle is found by the stored token after which it leaves, and by its own next token. A single hash table from
// (stored token, next token) to the segment that begins there therefore has all edges of the tree. It has at most one
// entry per sequence, and a token costs the same however many sequences branch off at one place.
class TokenTree {
  public:
    // Tree of up to `sequences` sequences with fewer than 2^32 - 1 stored tokens.
    explicit TokenTree(std::size_t sequences) : slots_(std::bit_ceil(2 * sequences + 2)) {
        segments_.reserve(sequences);
        shift_ = 64 - std::countr_zero(slots_.size());
    }

    // Inserts the next sequence, which has at least one token; its segment is stored from index `first` on.
    // The segment has at least one token: a sequence that an earlier one contains shares all tokens but its last.
    Branch insert(Tokens tokens, std::size_t first) {
        Branch branch;
        std::uint64_t after = 0;  // 1 + index of the stored token that the segment follows; 0 at the beginning
        while (true) {
            const std::uint64_t key = after << 32 | static_cast<std::uint32_t>(tokens[branch.shared]);
            Slot& slot = find(key);
            if (slot.sequence == nobody) {
                slot = {key, segments_.size()};
                break;
            }
            const Segment& other = segments_[slot.sequence];
            const std::size_t common = common_prefix(tokens.subspan(branch.shared), other.tokens);
            branch = {branch.shared + common, slot.sequence};
            if (branch.shared == tokens.size()) {
                // The last token is stored once more. This copy is never found, because the table has the earlier one.
                --branch.shared;
                break;
            }
            after = other.first + common;
        }
        segments_.push_back({tokens.subspan(branch.shared), first});
        return branch;
    }

  private:
    struct Segment {
        Tokens tokens;
        std::size_t first;  // index of its first token among the stored tokens
    };

    static constexpr std::size_t nobody = std::numeric_limits<std::size_t>::max();

    struct Slot {
        std::uint64_t key = 0;
        std::size_t sequence = nobody;
    };

    // Returns the slot with this key, or the empty slot for it: linear probing in a table that is at most half full.
    Slot& find(std::uint64_t key) {
        // Fibonacci hashing: the upper bits of the product depend on all bits of the key
        std::size_t i = (key * 0x9E3779B97F4A7C15U) >> shift_;
        while (slots_[i].sequence != nobody && slots_[i].key != key) {
            i = (i + 1) & (slots_.size() - 1);
        }
        return slots_[i];
    }

    std::vector<Slot> slots_;
    std::vector<Segment> segments_;
    int shift_;
};

}  // namespace efface
