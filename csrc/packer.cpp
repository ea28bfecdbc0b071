#include "packer.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "refuse.hpp"
#include "token_tree.hpp"

namespace efface {
namespace {

struct Chosen {
    std::vector<Sequence> sequences;
    std::vector<Branch> branches;  // (S) what each sequence shares, or empty
    PackSize size;
};

// Returns the tokens of a sequence that are packed. A sequence has at least two, so one is left without the last.
Tokens packed_tokens(const Sequence& sequence, const PackSettings& settings) {
    return sequence.ids.first(sequence.ids.size() - (settings.last_tokens ? 0 : 1));
}

// Looks up and checks the chosen sequences, in order, and finds out what they share.
Chosen find(Stores stores, const Choice& choice, const PackSettings& settings) {
    if (choice.roles.size() != choice.sequences.size()) {
        refuse("`roles` and `sequences`: expected equal lengths, got " + std::to_string(choice.roles.size()) + " and " +
               std::to_string(choice.sequences.size()));
    }
    Chosen chosen;
    chosen.sequences.reserve(choice.roles.size());
    std::size_t tokens = 0;
    std::size_t rows = 0;
    for (std::size_t s = 0; s < choice.roles.size(); ++s) {
        const std::int8_t role = choice.roles[s];
        if (role < 0 || static_cast<std::size_t>(role) >= stores.size()) {
            refuse("`roles`: expected a store in 0 .. " + std::to_string(static_cast<std::int64_t>(stores.size()) - 1) +
                   " (0 forget, 1 retain, 2 alternate), got " + std::to_string(role) + " at position " +
                   std::to_string(s));
        }
        const Sequence sequence = stores[static_cast<std::size_t>(role)]->find(choice.sequences[s]);
        chosen.sequences.push_back(sequence);
        tokens += packed_tokens(sequence, settings).size();
        rows += sequence.ids.size() - sequence.first_label;
        // cu_seqlens is int32, as attention kernels require. The sum is checked at each step, so it cannot overflow.
        if (tokens > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
            refuse("batch: expected fewer than 2^31 tokens, got at least " + std::to_string(tokens));
        }
    }
    std::size_t stored = tokens;
    if (settings.share) {
        stored = 0;
        TokenTree tree(chosen.sequences.size());
        chosen.branches.reserve(chosen.sequences.size());
        for (const Sequence& sequence : chosen.sequences) {
            const Tokens own = packed_tokens(sequence, settings);
            chosen.branches.push_back(tree.insert(own, stored));
            stored += own.size() - chosen.branches.back().shared;
        }
    }
    if (stored == tokens) {
        chosen.branches.clear();
    }
    chosen.size = {.sequences = static_cast<std::int64_t>(choice.roles.size()),
                   .tokens = static_cast<std::int64_t>(stored),
                   .rows = static_cast<std::int64_t>(rows),
                   .path_tokens = static_cast<std::int64_t>(stored < tokens ? tokens : 0)};
    return chosen;
}

// Returns the number of 64-bit words that `count` entries of T need.
template <typename T>
std::size_t words(std::size_t count) {
    return (count * sizeof(T) + 7) / 8;
}

// Takes `count` entries of T from the front of `rest`.
template <typename T>
std::span<T> take(std::span<std::int64_t>& rest, std::size_t count) {
    const std::span<T> part(reinterpret_cast<T*>(rest.data()), count);  // NOLINT: raw memory, divided up
    rest = rest.subspan(words<T>(count));
    return part;
}

}  // namespace

PackSize measure(Stores stores, const Choice& choice, const PackSettings& settings) {
    return find(stores, choice, settings).size;
}

std::int64_t storage_words(const PackSize& size) {
    const auto s = static_cast<std::size_t>(size.sequences);
    const auto e = static_cast<std::size_t>(size.path_tokens);
    const std::size_t paths = e == 0 ? 0 : words<std::int32_t>(e) + words<std::int32_t>(s + 1);
    return 2 * size.tokens + 2 * size.rows + size.sequences +
           static_cast<std::int64_t>(words<std::int32_t>(s + 1) + words<std::int8_t>(s) + paths);
}

PackedParts parts_of(std::span<std::int64_t> storage, const PackSize& size) {
    if (static_cast<std::int64_t>(storage.size()) != storage_words(size)) {
        refuse("`storage`: expected " + std::to_string(storage_words(size)) + " words, got " +
               std::to_string(storage.size()));
    }
    const auto t = static_cast<std::size_t>(size.tokens);
    const auto n = static_cast<std::size_t>(size.rows);
    const auto s = static_cast<std::size_t>(size.sequences);
    const auto e = static_cast<std::size_t>(size.path_tokens);
    // an initialiser list is evaluated from left to right
    return {.input_ids = take<std::int64_t>(storage, t),
            .position_ids = take<std::int64_t>(storage, t),
            .label_rows = take<std::int64_t>(storage, n),
            .targets = take<std::int64_t>(storage, n),
            .sequences = take<std::int64_t>(storage, s),
            .cu_seqlens = take<std::int32_t>(storage, s + 1),
            .roles = take<std::int8_t>(storage, s),
            .paths = take<std::int32_t>(storage, e),
            .cu_paths = take<std::int32_t>(storage, e == 0 ? 0 : s + 1)};
}

PackedLengths pack(Stores stores, const Choice& choice, std::span<std::int64_t> storage, const PackSettings& settings) {
    const Chosen chosen = find(stores, choice, settings);
    const PackedParts parts = parts_of(storage, chosen.size);
    PackedLengths packed;
    packed.lengths.resize(choice.sequences.size());
    packed.segment_lengths.resize(choice.sequences.size());
    packed.row_offsets.resize(choice.sequences.size() + 1);
    packed.forget_sequences = std::ranges::count_if(
        choice.roles, [](std::int8_t role) { return role != static_cast<std::int8_t>(Role::retain); });

    std::size_t token = 0;
    std::size_t row = 0;
    std::size_t entry = 0;  // of the paths
    std::ranges::copy(choice.sequences, parts.sequences.begin());
    std::ranges::copy(choice.roles, parts.roles.begin());
    parts.cu_seqlens[0] = 0;
    if (!parts.cu_paths.empty()) {
        parts.cu_paths[0] = 0;
    }
    for (std::size_t s = 0; s < chosen.sequences.size(); ++s) {
        const Sequence& sequence = chosen.sequences[s];
        const Branch branch = chosen.branches.empty() ? Branch{} : chosen.branches[s];
        const Tokens tokens = packed_tokens(sequence, settings);
        const Tokens segment = tokens.subspan(branch.shared);
        std::ranges::copy(segment, parts.input_ids.begin() + static_cast<std::ptrdiff_t>(token));
        const auto positions = parts.position_ids.subspan(token, segment.size());
        std::iota(positions.begin(), positions.end(), static_cast<std::int64_t>(branch.shared));
        const auto labels = sequence.ids.subspan(sequence.first_label);
        std::ranges::copy(labels, parts.targets.begin() + static_cast<std::ptrdiff_t>(row));
        const auto label_rows = parts.label_rows.subspan(row, labels.size());
        if (chosen.branches.empty()) {
            std::iota(label_rows.begin(), label_rows.end(),
                      static_cast<std::int64_t>(token + sequence.first_label - 1));
        } else {
            const auto path = parts.paths.subspan(entry, tokens.size());
            const auto like = parts.paths.subspan(static_cast<std::size_t>(parts.cu_paths[branch.like]));
            std::ranges::copy(like.first(branch.shared), path.begin());
            std::iota(path.begin() + static_cast<std::ptrdiff_t>(branch.shared), path.end(),
                      static_cast<std::int32_t>(token));
            std::ranges::copy(path.subspan(sequence.first_label - 1, labels.size()), label_rows.begin());
            entry += path.size();
            parts.cu_paths[s + 1] = static_cast<std::int32_t>(entry);
        }
        token += segment.size();
        row += labels.size();
        packed.lengths[s] = static_cast<std::int64_t>(sequence.ids.size());
        packed.segment_lengths[s] = static_cast<std::int64_t>(segment.size());
        parts.cu_seqlens[s + 1] = static_cast<std::int32_t>(token);
        packed.row_offsets[s + 1] = static_cast<std::int64_t>(row);
    }
    return packed;
}

}  // namespace efface
