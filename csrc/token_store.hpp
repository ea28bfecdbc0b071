// Token stores: sequences laid end to end in one or more chunks, read where they are and never copied as a whole.
//
// A chunk is what one record batch of an Arrow file is in memory, so a memory-mapped corpus larger than RAM is a store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace efface {

// Sequence i of a chunk is ids[offsets[i] .. offsets[i + 1]]; its tokens from label_starts[i] on (counted within the
// sequence) are labels, those before are prompt.
struct TokenChunk {
    std::span<const std::int32_t> ids;
    std::span<const std::int64_t> offsets;
    std::span<const std::int64_t> label_starts;
};

// One checked sequence: its tokens, and the first of them that a hidden state predicts. 1 <= first_label < ids.size().
struct Sequence {
    std::span<const std::int32_t> ids;
    std::size_t first_label;
};

class TokenStore {
  public:
    // Throws std::invalid_argument for a chunk whose arrays do not fit one another. `name` is for error messages.
    TokenStore(std::string name, std::vector<TokenChunk> chunks);

    [[nodiscard]] std::int64_t size() const { return firsts_.back(); }

    // Throws std::invalid_argument, with the offending values, for an index out of range, offsets that leave the chunk,
    // or a sequence without labels. Offsets of sequences that nobody asks for are never read: a batch costs what it
    // holds and not what the store holds.
    [[nodiscard]] Sequence find(std::int64_t index) const;

  private:
    std::string name_;
    std::vector<TokenChunk> chunks_;
    std::vector<std::int64_t> firsts_;  // firsts_[c] is the first sequence of chunk c; the last entry is the count
};

}  // namespace efface
