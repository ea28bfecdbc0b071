#include "packer.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "refuse.hpp"

namespace efface {
namespace {

struct Chosen {
    std::vector<Sequence> sequences;
    PackSize size;
};

// Looks up and checks the chosen sequences, in order.
Chosen find(Stores stores, const Choice& choice) {
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
        tokens += sequence.ids.size();
        rows += sequence.ids.size() - sequence.first_label;
        // cu_seqlens is int32, as attention kernels require. The sum is checked at each step, so it cannot overflow.
        if (tokens > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
            refuse("batch: expected fewer than 2^31 tokens, got at least " + std::to_string(tokens));
        }
    }
    chosen.size = {static_cast<std::int64_t>(choice.roles.size()), static_cast<std::int64_t>(tokens),
                   static_cast<std::int64_t>(rows)};
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

PackSize measure(Stores stores, const Choice& choice) { return find(stores, choice).size; }

std::int64_t storage_words(const PackSize& size) {
    const auto s = static_cast<std::size_t>(size.sequences);
    return 2 * size.tokens + 2 * size.rows + size.sequences +
           static_cast<std::int64_t>(words<std::int32_t>(s + 1) + words<std::int8_t>(s));
}

PackedParts parts_of(std::span<std::int64_t> storage, const PackSize& size) {
    if (static_cast<std::int64_t>(storage.size()) != storage_words(size)) {
        refuse("`storage`: expected " + std::to_string(storage_words(size)) + " words, got " +
               std::to_string(storage.size()));
    }
    const auto t = static_cast<std::size_t>(size.tokens);
    const auto n = static_cast<std::size_t>(size.rows);
    const auto s = static_cast<std::size_t>(size.sequences);
    // an initialiser list is evaluated from left to right
    return {take<std::int64_t>(storage, t), take<std::int64_t>(storage, t), take<std::int64_t>(storage, n),
            take<std::int64_t>(storage, n), take<std::int64_t>(storage, s), take<std::int32_t>(storage, s + 1),
            take<std::int8_t>(storage, s)};
}

PackedLengths pack(Stores stores, const Choice& choice, std::span<std::int64_t> storage) {
    const Chosen chosen = find(stores, choice);
    const PackedParts parts = parts_of(storage, chosen.size);
    PackedLengths packed;
    packed.lengths.resize(choice.sequences.size());
    packed.row_offsets.resize(choice.sequences.size() + 1);
    packed.forget_sequences = std::ranges::count_if(
        choice.roles, [](std::int8_t role) { return role != static_cast<std::int8_t>(Role::retain); });

    std::size_t token = 0;
    std::size_t row = 0;
    std::size_t s = 0;
    std::ranges::copy(choice.sequences, parts.sequences.begin());
    std::ranges::copy(choice.roles, parts.roles.begin());
    parts.cu_seqlens[0] = 0;
    for (const Sequence& sequence : chosen.sequences) {
        const auto labels = sequence.ids.subspan(sequence.first_label);
        std::ranges::copy(sequence.ids, parts.input_ids.begin() + static_cast<std::ptrdiff_t>(token));
        const auto positions = parts.position_ids.subspan(token, sequence.ids.size());
        std::iota(positions.begin(), positions.end(), std::int64_t{0});
        std::ranges::copy(labels, parts.targets.begin() + static_cast<std::ptrdiff_t>(row));
        const auto label_rows = parts.label_rows.subspan(row, labels.size());
        std::iota(label_rows.begin(), label_rows.end(), static_cast<std::int64_t>(token + sequence.first_label - 1));
        token += sequence.ids.size();
        row += labels.size();
        packed.lengths[s] = static_cast<std::int64_t>(sequence.ids.size());
        ++s;
        parts.cu_seqlens[s] = static_cast<std::int32_t>(token);
        packed.row_offsets[s] = static_cast<std::int64_t>(row);
    }
    return packed;
}

}  // namespace efface
