#include "packer.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <string_view>

#include "refuse.hpp"

namespace efface {
namespace {

// Calls visit(sequence) for each chosen sequence, in order, checking each.
template <typename Visit>
void for_each_chosen(Stores stores, const Choice& choice, Visit visit) {
    if (choice.roles.size() != choice.sequences.size()) {
        refuse("`roles` and `sequences`: expected equal lengths, got " + std::to_string(choice.roles.size()) + " and " +
               std::to_string(choice.sequences.size()));
    }
    for (std::size_t s = 0; s < choice.roles.size(); ++s) {
        const std::int8_t role = choice.roles[s];
        if (role < 0 || static_cast<std::size_t>(role) >= stores.size()) {
            refuse("`roles`: expected a store in 0 .. " + std::to_string(static_cast<std::int64_t>(stores.size()) - 1) +
                   " (0 forget, 1 retain, 2 alternate), got " + std::to_string(role) + " at position " +
                   std::to_string(s));
        }
        visit(stores[static_cast<std::size_t>(role)]->find(choice.sequences[s]));
    }
}

template <typename T>
void check_extent(std::span<T> buffer, std::string_view name, std::int64_t expected) {
    if (static_cast<std::int64_t>(buffer.size()) != expected) {
        refuse(quoted(name) + ": expected " + std::to_string(expected) + " entries, got " +
               std::to_string(buffer.size()));
    }
}

}  // namespace

PackSize measure(Stores stores, const Choice& choice) {
    std::size_t tokens = 0;
    std::size_t rows = 0;
    for_each_chosen(stores, choice, [&](const Sequence& sequence) {
        tokens += sequence.ids.size();
        rows += sequence.ids.size() - sequence.first_label;
        // cu_seqlens is int32, as attention kernels want it. Checked at each step, so the sum cannot wrap either.
        if (tokens > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
            refuse("batch: expected fewer than 2^31 tokens, got at least " + std::to_string(tokens));
        }
    });
    return {static_cast<std::int64_t>(choice.roles.size()), static_cast<std::int64_t>(tokens),
            static_cast<std::int64_t>(rows)};
}

void pack(Stores stores, const Choice& choice, const PackBuffers& buffers) {
    const PackSize size = measure(stores, choice);
    check_extent(buffers.input_ids, "input_ids", size.tokens);
    check_extent(buffers.position_ids, "position_ids", size.tokens);
    check_extent(buffers.cu_seqlens, "cu_seqlens", size.sequences + 1);
    check_extent(buffers.label_rows, "label_rows", size.rows);
    check_extent(buffers.targets, "targets", size.rows);
    check_extent(buffers.row_offsets, "row_offsets", size.sequences + 1);

    std::size_t token = 0;
    std::size_t row = 0;
    std::size_t s = 0;
    buffers.cu_seqlens[0] = 0;
    buffers.row_offsets[0] = 0;
    for_each_chosen(stores, choice, [&](const Sequence& sequence) {
        const auto labels = sequence.ids.subspan(sequence.first_label);
        std::ranges::copy(sequence.ids, buffers.input_ids.begin() + static_cast<std::ptrdiff_t>(token));
        const auto positions = buffers.position_ids.subspan(token, sequence.ids.size());
        std::iota(positions.begin(), positions.end(), std::int64_t{0});
        std::ranges::copy(labels, buffers.targets.begin() + static_cast<std::ptrdiff_t>(row));
        const auto label_rows = buffers.label_rows.subspan(row, labels.size());
        std::iota(label_rows.begin(), label_rows.end(), static_cast<std::int64_t>(token + sequence.first_label - 1));
        token += sequence.ids.size();
        row += labels.size();
        ++s;
        buffers.cu_seqlens[s] = static_cast<std::int32_t>(token);
        buffers.row_offsets[s] = static_cast<std::int64_t>(row);
    });
}

}  // namespace efface
