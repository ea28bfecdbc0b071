// The packer: copies chosen token sequences into one flat batch without padding.
//
// S sequences are packed into T stored tokens; sequence s stores the tokens cu_seqlens[s] .. cu_seqlens[s + 1], its
// *segment*. With `share`, a segment has only the tokens that its sequence does not share with an earlier sequence of
// the batch from the first token on (token_tree.hpp), and at least one token. The *path* of a sequence is the list of
// the stored indices of all its tokens, in order.
//
// A *label row* is a stored token whose next token in a sequence is a label: the head is applied to its hidden state,
// and its target is that next token. A stored token can be a label row of several sequences. For packed batches, the
// label shift of causal language models is done here and nowhere else.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "token_store.hpp"

namespace efface {

// Role of a sequence in a batch, and index of the store it comes from.
enum class Role : std::int8_t { forget = 0, retain = 1, alternate = 2 };

// The sequences of a batch, in the order of packing: sequences[s] is an index into the store roles[s].
struct Choice {
    std::span<const std::int8_t> roles;
    std::span<const std::int64_t> sequences;
};

struct PackSettings {
    bool share = false;       // store what sequences share from their first token on once
    bool last_tokens = true;  // store the last token of each sequence too, although it predicts nothing
};

struct PackSize {
    std::int64_t sequences;    // S
    std::int64_t tokens;       // T, stored tokens
    std::int64_t rows;         // N, label rows
    std::int64_t path_tokens;  // E, length of all paths together; 0 if nothing is shared, and paths are not stored
};

// Parts of a packed batch, in the order of its storage. The storage is one block of memory, so that a single copy moves
// a batch to a device. Each part begins at a multiple of eight bytes.
struct PackedParts {
    std::span<std::int64_t> input_ids;     // (T)
    std::span<std::int64_t> position_ids;  // (T) position in the sequence
    std::span<std::int64_t> label_rows;    // (N) stored indices in 0 .. T - 1, sequence after sequence
    std::span<std::int64_t> targets;       // (N)
    std::span<std::int64_t> sequences;     // (S) copied from the choice
    std::span<std::int32_t> cu_seqlens;    // (S + 1) borders of the segments
    std::span<std::int8_t> roles;          // (S) copied from the choice
    std::span<std::int32_t> paths;         // (E) stored indices in 0 .. T - 1, path after path
    std::span<std::int32_t> cu_paths;      // (S + 1) borders of the paths; empty if E is 0
};

// Returns the number of 8-byte words of a batch's storage.
std::int64_t storage_words(const PackSize& size);

// Divides `storage` into its parts. Throws std::invalid_argument unless it has exactly storage_words(size) words.
PackedParts parts_of(std::span<std::int64_t> storage, const PackSize& size);

// The stores of a run, in the order of the roles; a run without alternates has two.
using Stores = std::span<const TokenStore* const>;

// Checks the choice against the stores and returns the size of the packed batch.
// Throws std::invalid_argument, with the offending values, for an unknown role, a batch of 2^31 tokens or more (shared
// tokens counted in each sequence), and in all cases in which TokenStore::find does.
PackSize measure(Stores stores, const Choice& choice, const PackSettings& settings = {});

// Lengths that the host needs for planning.
struct PackedLengths {
    std::vector<std::int64_t> lengths;          // (S) all tokens of each sequence, including one that is left out
    std::vector<std::int64_t> segment_lengths;  // (S) tokens that each sequence stores
    std::vector<std::int64_t> row_offsets;      // (S + 1) first label row of each sequence; the last entry is N
    std::int64_t forget_sequences = 0;          // number of forget and alternate sequences
};

// Writes the packed batch into the storage. All checks of measure(), and the check of the storage's size, are made
// before the first write.
PackedLengths pack(Stores stores, const Choice& choice, std::span<std::int64_t> storage,
                   const PackSettings& settings = {});

}  // namespace efface
