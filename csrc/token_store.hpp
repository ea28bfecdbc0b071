// Token stores: sequences concatenated in one or more chunks. The chunks are read in place and never copied as a whole.
//
// A chunk has the memory layout of a record batch of an Arrow file, so a memory-mapped corpus larger than RAM can be
// used as a store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace efface {

using Tokens = std::span<const std::int32_t>;

// Sequence i of a chunk is ids[offsets[i] .. offsets[i + 1]]. Its tokens from label_starts[i] on, counted within the
// sequence, are labels; the tokens before are the prompt.
struct TokenChunk {
    Tokens ids;
    std::span<const std::int64_t> offsets;
    std::span<const std::int64_t> label_starts;
};

// One checked sequence: its tokens, and the position of its first label. 1 <= first_label < ids.size().
struct Sequence {
    Tokens ids;
    std::size_t first_label;
};

class TokenStore {
  public:
    // Throws std::invalid_argument for a chunk whose arrays have inconsistent lengths. `name` is used in error
    // messages.
    TokenStore(std::string name, std::vector<TokenChunk> chunks);

    [[nodiscard]] std::int64_t size() const { return firsts_.back(); }

    // Returns the sequence at `index`. Throws std::invalid_argument, with the offending values, for an index out of
    // range, offsets outside the chunk, or a sequence without labels. Offsets of other sequences are not read, so the
    // cost of a batch does not depend on the size of the store.
    [[nodiscard]] Sequence find(std::int64_t index) const;

    // Returns the tokens of the sequence at `index`, which needs no labels. Throws for an index or offsets as find
    // does.
    [[nodiscard]] Tokens tokens(std::int64_t index) const;

  private:
    // A template, because one more call in find would make measure() slower by 5 ns a sequence, a fifth.
    template <bool labelled>
    [[nodiscard]] Sequence look_up(std::int64_t index) const;

    std::string name_;
    std::vector<TokenChunk> chunks_;
    std::vector<std::int64_t> firsts_;  // firsts_[c] is the first sequence of chunk c; the last entry is the count
};

}  // namespace efface
