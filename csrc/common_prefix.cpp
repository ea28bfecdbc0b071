#include "common_prefix.hpp"

#include <string>

#include "refuse.hpp"

namespace efface {

std::vector<std::int64_t> prefix_lengths(const TokenStore& store, Tokens prefix) {
    std::vector<std::int64_t> lengths(static_cast<std::size_t>(store.size()));
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        const Tokens tokens = store.tokens(static_cast<std::int64_t>(i));
        lengths[i] = static_cast<std::int64_t>(common_prefix(tokens, prefix));
    }
    return lengths;
}

std::vector<std::int64_t> pair_prefix_lengths(const TokenStore& one, const TokenStore& other) {
    if (one.size() != other.size()) {
        refuse("`one`, `other`: expected stores with equal numbers of sequences, got " + std::to_string(one.size()) +
               " and " + std::to_string(other.size()));
    }
    std::vector<std::int64_t> lengths(static_cast<std::size_t>(one.size()));
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        const auto index = static_cast<std::int64_t>(i);
        lengths[i] = static_cast<std::int64_t>(common_prefix(one.tokens(index), other.tokens(index)));
    }
    return lengths;
}

}  // namespace efface
