#include "packer.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>

namespace efface {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string quoted(std::string_view name) { return std::string("`").append(name).append("`"); }

// One sequence, checked: begin and length in the store's ids, and the first label that a hidden state predicts.
struct Sequence {
    std::size_t begin;
    std::size_t length;
    std::size_t first_label;
};

void check_store(const TokenStore& store, std::string_view name) {
    if (store.offsets.empty()) {
        refuse(quoted(name) + " offsets: expected at least one entry (0), got none");
    }
    if (store.label_starts.size() + 1 != store.offsets.size()) {
        refuse(quoted(name) + " label_starts: expected " + std::to_string(store.offsets.size() - 1) +
               " entries, one for each sequence, got " + std::to_string(store.label_starts.size()));
    }
}

// The offsets of unchosen sequences are never read, so a batch costs what it holds and not what the store holds.
Sequence find(const TokenStore& store, std::string_view name, std::int64_t index) {
    const auto count = static_cast<std::int64_t>(store.label_starts.size());
    if (index < 0 || index >= count) {
        refuse(quoted(name) + " sequence: expected an index in 0 .. " + std::to_string(count - 1) + ", got " +
               std::to_string(index));
    }
    const auto i = static_cast<std::size_t>(index);
    const std::int64_t begin = store.offsets[i];
    const std::int64_t end = store.offsets[i + 1];
    if (begin < 0 || end < begin || end > static_cast<std::int64_t>(store.ids.size())) {
        refuse(quoted(name) + " offsets: sequence " + std::to_string(index) + " spans " + std::to_string(begin) +
               " .. " + std::to_string(end) + ", expected an ascending range within 0 .. " +
               std::to_string(store.ids.size()));
    }
    const std::int64_t length = end - begin;
    const std::int64_t start = store.label_starts[i];
    if (start < 0) {
        refuse(quoted(name) + " label_starts: sequence " + std::to_string(index) + " has " + std::to_string(start) +
               ", expected a position in 0 .. " + std::to_string(length));
    }
    // No hidden state comes before token 0, so token 0 is never a target.
    const std::int64_t first_label = std::max<std::int64_t>(start, 1);
    if (first_label >= length) {
        refuse(quoted(name) + " sequence " + std::to_string(index) + " has no label: its " + std::to_string(length) +
               " tokens end before its first label at position " + std::to_string(first_label) +
               "; drop the row or raise the maximum length");
    }
    return {static_cast<std::size_t>(begin), static_cast<std::size_t>(length), static_cast<std::size_t>(first_label)};
}

// Calls visit(store, sequence) for each chosen sequence, in order, checking each.
template <typename Visit>
void for_each_chosen(const TokenStore& forget, const TokenStore& retain, const Choice& choice, Visit visit) {
    check_store(forget, "forget");
    check_store(retain, "retain");
    if (choice.roles.size() != choice.sequences.size()) {
        refuse("`roles` and `sequences`: expected equal lengths, got " + std::to_string(choice.roles.size()) + " and " +
               std::to_string(choice.sequences.size()));
    }
    for (std::size_t s = 0; s < choice.roles.size(); ++s) {
        switch (static_cast<Role>(choice.roles[s])) {
            case Role::forget:
                visit(forget, find(forget, "forget", choice.sequences[s]));
                break;
            case Role::retain:
                visit(retain, find(retain, "retain", choice.sequences[s]));
                break;
            default:
                refuse("`roles`: expected 0 (forget) or 1 (retain), got " + std::to_string(choice.roles[s]) +
                       " at position " + std::to_string(s));
        }
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

PackSize measure(const TokenStore& forget, const TokenStore& retain, const Choice& choice) {
    std::size_t tokens = 0;
    std::size_t rows = 0;
    for_each_chosen(forget, retain, choice, [&](const TokenStore&, const Sequence& sequence) {
        tokens += sequence.length;
        rows += sequence.length - sequence.first_label;
        // cu_seqlens is int32, as attention kernels want it. Checked at each step, so the sum cannot wrap either.
        if (tokens > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
            refuse("batch: expected fewer than 2^31 tokens, got at least " + std::to_string(tokens));
        }
    });
    return {static_cast<std::int64_t>(choice.roles.size()), static_cast<std::int64_t>(tokens),
            static_cast<std::int64_t>(rows)};
}

void pack(const TokenStore& forget, const TokenStore& retain, const Choice& choice, const PackBuffers& buffers) {
    const PackSize size = measure(forget, retain, choice);
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
    for_each_chosen(forget, retain, choice, [&](const TokenStore& store, const Sequence& sequence) {
        const auto ids = store.ids.subspan(sequence.begin, sequence.length);
        const auto labels = ids.subspan(sequence.first_label);
        std::ranges::copy(ids, buffers.input_ids.begin() + static_cast<std::ptrdiff_t>(token));
        const auto positions = buffers.position_ids.subspan(token, sequence.length);
        std::iota(positions.begin(), positions.end(), std::int64_t{0});
        std::ranges::copy(labels, buffers.targets.begin() + static_cast<std::ptrdiff_t>(row));
        const auto label_rows = buffers.label_rows.subspan(row, labels.size());
        std::iota(label_rows.begin(), label_rows.end(), static_cast<std::int64_t>(token + sequence.first_label - 1));
        token += sequence.length;
        row += labels.size();
        ++s;
        buffers.cu_seqlens[s] = static_cast<std::int32_t>(token);
        buffers.row_offsets[s] = static_cast<std::int64_t>(row);
    });
}

}  // namespace efface
