#include "token_store.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

#include "refuse.hpp"

namespace efface {

TokenStore::TokenStore(std::string name, std::vector<TokenChunk> chunks)
    : name_(std::move(name)), chunks_(std::move(chunks)), firsts_{0} {
    firsts_.reserve(chunks_.size() + 1);
    for (const TokenChunk& chunk : chunks_) {
        if (chunk.offsets.empty()) {
            refuse(quoted(name_) + " offsets: expected at least one entry (0), got none");
        }
        if (chunk.label_starts.size() + 1 != chunk.offsets.size()) {
            refuse(quoted(name_) + " label_starts: expected " + std::to_string(chunk.offsets.size() - 1) +
                   " entries, one for each sequence, got " + std::to_string(chunk.label_starts.size()));
        }
        firsts_.push_back(firsts_.back() + static_cast<std::int64_t>(chunk.label_starts.size()));
    }
}

template <bool labelled>
Sequence TokenStore::look_up(std::int64_t index) const {
    if (index < 0 || index >= size()) {
        refuse(quoted(name_) + " sequence: expected an index in 0 .. " + std::to_string(size() - 1) + ", got " +
               std::to_string(index));
    }
    const auto after = std::ranges::upper_bound(firsts_, index);
    const auto c = static_cast<std::size_t>(std::distance(firsts_.begin(), after)) - 1;
    const TokenChunk& chunk = chunks_[c];
    const auto i = static_cast<std::size_t>(index - firsts_[c]);
    const std::int64_t begin = chunk.offsets[i];
    const std::int64_t end = chunk.offsets[i + 1];
    if (begin < 0 || end < begin || end > static_cast<std::int64_t>(chunk.ids.size())) {
        refuse(quoted(name_) + " offsets: sequence " + std::to_string(index) + " spans " + std::to_string(begin) +
               " .. " + std::to_string(end) + ", expected an ascending range within 0 .. " +
               std::to_string(chunk.ids.size()));
    }
    const std::int64_t length = end - begin;
    const Tokens ids = chunk.ids.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(length));
    if constexpr (!labelled) {
        return {ids, 0};
    }
    const std::int64_t start = chunk.label_starts[i];
    if (start < 0) {
        refuse(quoted(name_) + " label_starts: sequence " + std::to_string(index) + " has " + std::to_string(start) +
               ", expected a position in 0 .. " + std::to_string(length));
    }
    // No hidden state precedes token 0, so token 0 is never a target.
    const std::int64_t first_label = std::max<std::int64_t>(start, 1);
    if (first_label >= length) {
        refuse(quoted(name_) + " sequence " + std::to_string(index) + " has no label: its " + std::to_string(length) +
               " tokens end before its first label at position " + std::to_string(first_label) +
               "; drop the row or raise the maximum length");
    }
    return {ids, static_cast<std::size_t>(first_label)};
}

Sequence TokenStore::find(std::int64_t index) const { return look_up<true>(index); }

Tokens TokenStore::tokens(std::int64_t index) const { return look_up<false>(index).ids; }

}  // namespace efface
