// The packer: copies chosen token sequences into one flat batch without padding.
//
// A batch is flat. S sequences stand one behind another in T tokens; sequence s owns the tokens
// cu_seqlens[s] .. cu_seqlens[s + 1]. A *label row* is a position whose next token is a label: its
// hidden state enters the head, its target is that next token. The label shift of causal language
// models is done here and nowhere else for packed batches.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "token_store.hpp"

namespace efface {

// What a sequence of a batch is there for, and which of the stores it comes from.
enum class Role : std::int8_t { forget = 0, retain = 1, alternate = 2 };

// The sequences of a batch, in the order in which they are packed: sequences[s] is an index into the store roles[s].
struct Choice {
    std::span<const std::int8_t> roles;
    std::span<const std::int64_t> sequences;
};

struct PackSize {
    std::int64_t sequences;  // S
    std::int64_t tokens;     // T
    std::int64_t rows;       // N, label rows
};

// The parts of a packed batch, in the order in which they lie in its storage: one piece of memory, so that one copy
// brings a batch to a device. Each part begins at a multiple of eight bytes.
struct PackedParts {
    std::span<std::int64_t> input_ids;     // (T)
    std::span<std::int64_t> position_ids;  // (T) from 0 in each sequence
    std::span<std::int64_t> label_rows;    // (N) positions in 0 .. T - 1
    std::span<std::int64_t> targets;       // (N)
    std::span<std::int64_t> sequences;     // (S) as chosen
    std::span<std::int32_t> cu_seqlens;    // (S + 1)
    std::span<std::int8_t> roles;          // (S) as chosen
};

// Words of eight bytes that a batch's storage has.
std::int64_t storage_words(const PackSize& size);

// Throws std::invalid_argument if `storage` has not exactly storage_words(size) words.
PackedParts parts_of(std::span<std::int64_t> storage, const PackSize& size);

// The stores of a run, in the order of the roles; a run without alternates has two.
using Stores = std::span<const TokenStore* const>;

// Checks the choice against the stores and returns the extents of the packed batch.
// Throws std::invalid_argument, with the offending values, for an unknown role, a batch of 2^31 tokens or more, and
// whatever TokenStore::find refuses.
PackSize measure(Stores stores, const Choice& choice);

// What the host plans with.
struct PackedLengths {
    std::vector<std::int64_t> lengths;      // (S) tokens of each sequence
    std::vector<std::int64_t> row_offsets;  // (S + 1) label rows of each sequence
    std::int64_t forget_sequences = 0;      // forget and alternate ones
};

// Fills the storage. Checks all that measure() checks, and the storage's extent, before the first write.
PackedLengths pack(Stores stores, const Choice& choice, std::span<std::int64_t> storage);

}  // namespace efface
