// Beginnings that token sequences have in common. Only these beginnings are read, up to the first difference.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "token_store.hpp"

namespace efface {

// Returns the number of tokens that are equal in both from the first token on.
inline std::size_t common_prefix(Tokens one, Tokens other) {
    constexpr std::size_t block = 16;
    const std::size_t limit = std::min(one.size(), other.size());
    std::size_t at = 0;
    const auto differ = [&] {  // in the next block; without a branch, so that compilers vectorise the loop
        std::uint32_t different = 0;
        for (std::size_t i = at; i < at + block; ++i) {
            different |= static_cast<std::uint32_t>(one[i] ^ other[i]);
        }
        return different != 0;
    };
    while (at + block <= limit && !differ()) {
        at += block;
    }
    while (at < limit && one[at] == other[at]) {
        ++at;
    }
    return at;
}

// Returns the length of the longest common prefix of each sequence of the store with `prefix`.
// Throws std::invalid_argument for offsets outside their chunk. Sequences need no labels.
std::vector<std::int64_t> prefix_lengths(const TokenStore& store, Tokens prefix);

// Returns the length of the longest common prefix of sequence i of both stores, for each i.
// Throws std::invalid_argument for stores of different sizes, and for offsets outside their chunk.
std::vector<std::int64_t> pair_prefix_lengths(const TokenStore& one, const TokenStore& other);

}  // namespace efface
