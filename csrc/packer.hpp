// The packer: copies chosen token sequences into one flat batch without padding.
//
// A batch is flat. S sequences stand one behind another in T tokens; sequence s owns the tokens
// cu_seqlens[s] .. cu_seqlens[s + 1]. A *label row* is a position whose next token is a label: its
// hidden state enters the head, its target is that next token. The label shift of causal language
// models is done here and nowhere else for packed batches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace efface {

// Token sequences laid end to end. Sequence i is ids[offsets[i] .. offsets[i + 1]]; its tokens from
// label_starts[i] on (counted within the sequence) are labels, those before are prompt.
struct TokenStore {
    std::span<const std::int32_t> ids;
    std::span<const std::int64_t> offsets;
    std::span<const std::int64_t> label_starts;
};

enum class Role : std::int8_t { forget = 0, retain = 1 };

// The sequences of a batch, in the order in which they are packed: sequences[s] is an index into
// the store that roles[s] names.
struct Choice {
    std::span<const std::int8_t> roles;
    std::span<const std::int64_t> sequences;
};

struct PackSize {
    std::int64_t sequences;  // S
    std::int64_t tokens;     // T
    std::int64_t rows;       // N, label rows
};

// Buffers owned by the caller; every extent must equal the one that measure() returns.
struct PackBuffers {
    std::span<std::int64_t> input_ids;     // (T)
    std::span<std::int64_t> position_ids;  // (T) from 0 in each sequence
    std::span<std::int32_t> cu_seqlens;    // (S + 1)
    std::span<std::int64_t> label_rows;    // (N) positions in 0 .. T - 1
    std::span<std::int64_t> targets;       // (N)
    std::span<std::int64_t> row_offsets;   // (S + 1) the label rows of each sequence
};

// Checks the choice against the stores and returns the extents of the packed batch.
// Throws std::invalid_argument, with the offending values, for an inconsistent store, an unknown
// role, a sequence index out of range, a sequence without labels, or a batch of 2^31 tokens or more.
PackSize measure(const TokenStore& forget, const TokenStore& retain, const Choice& choice);

// Fills the buffers. Checks all that measure() checks, and every buffer's extent, before the first write.
void pack(const TokenStore& forget, const TokenStore& retain, const Choice& choice, const PackBuffers& buffers);

}  // namespace efface
