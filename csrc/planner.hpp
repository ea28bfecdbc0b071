// The planner: assigns pairs to optimizer steps, and splits the sequences of a step over ranks and micro-batches.
//
// A plan is a pure function of lengths and settings. The pairs of a step do not depend on world_size or token_budget;
// only their arrangement does. A run on eight devices therefore has the same sequences in every step as a run on one
// device.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "packer.hpp"

namespace efface {

enum class RetainSampling : std::uint8_t {
    random,  // each pair draws its retain sequence from the whole retain set
    cycle,   // shuffled rounds over the retain set, continued from epoch to epoch
    paired   // forget sequence i is paired with retain sequence i
};

struct EpochSettings {
    std::int64_t pairs_per_step;
    std::int64_t token_budget;   // maximum tokens of a micro-batch
    std::int64_t shared_tokens;  // tokens that every micro-batch with sequences has once, in addition to theirs
    std::int64_t world_size;
    std::uint64_t seed;
    std::uint64_t epoch;
    RetainSampling retain_sampling;
    bool drop_last;  // leave out the last step if it has fewer pairs
};

// The plan of P pairs in order; step k starts with pair k * pairs_per_step. Micro-batch b consists of the entries
// batch_offsets[b] .. batch_offsets[b + 1] of roles and sequences. Step k consists of the micro-batches
// step_offsets[k] .. step_offsets[k + 1]; rank r processes every world_size-th of them, starting with r. A micro-batch
// contains forget sequences, each followed by its alternate if there are alternates, and then retain sequences.
struct EpochPlan {
    std::vector<std::int64_t> forget;  // (P), empty if the forget set is empty
    std::vector<std::int64_t> retain;  // (P), empty if the retain set is empty
    std::vector<std::int8_t> roles;
    std::vector<std::int64_t> sequences;
    std::vector<std::int64_t> batch_offsets;
    std::vector<std::int64_t> batch_tokens;  // with the shared tokens; 0 if the micro-batch is empty
    std::vector<std::int64_t> step_offsets;
    // sequences (with their alternates) that are longer than token_budget with the shared tokens, each in its own batch
    std::int64_t over_budget = 0;
};

// A length is the number of tokens that a sequence adds to a micro-batch: without the shared tokens, which all
// sequences begin with. `alternate_lengths` is empty or has one entry per forget sequence. An alternate is in the
// micro-batch of its forget sequence. If one of the two sets is empty, the epoch iterates over the other one.
//
// Every forget sequence occurs exactly once per epoch, except those of a dropped last step. All ranks have the same
// number of micro-batches in a step, and the sums of their lengths differ by at most the longest sequence. A rank with
// no sequence in a step has an empty micro-batch.
//
// Throws std::invalid_argument for two empty sets, lengths below 1 or above 2^31 - 1, counts below 1, shared_tokens
// outside 0 .. 2^31 - 1, alternates or paired retain sequences whose number differs from that of the forget sequences,
// and a drop_last that leaves no step.
EpochPlan plan_epoch(std::span<const std::int64_t> forget_lengths, std::span<const std::int64_t> retain_lengths,
                     std::span<const std::int64_t> alternate_lengths, const EpochSettings& settings);

}  // namespace efface
