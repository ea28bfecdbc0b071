// The planner: which pairs an optimizer step holds, and how its sequences are split over ranks and micro-batches.
//
// A plan is a pure function of lengths and settings. The pairs of a step depend on neither world_size nor token_budget;
// only their arrangement does. So a run on eight devices holds in every step what the run on one holds.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "packer.hpp"

namespace efface {

enum class RetainSampling : std::uint8_t {
    random,  // each pair draws its retain sequence from all of them
    cycle,   // shuffled rounds over the retain set, going on from epoch to epoch
    paired   // forget sequence i goes with retain sequence i
};

struct EpochSettings {
    std::int64_t pairs_per_step;
    std::int64_t token_budget;  // of a micro-batch
    std::int64_t world_size;
    std::uint64_t seed;
    std::uint64_t epoch;
    RetainSampling retain_sampling;
    bool drop_last;  // leave out a last step of fewer pairs
};

// P pairs in order; step k owns the pairs k * pairs_per_step and on. Micro-batch b owns the items
// batch_offsets[b] .. batch_offsets[b + 1]; step k the micro-batches step_offsets[k] .. step_offsets[k + 1], of which
// those of rank r are every world_size-th from r on. Within a micro-batch: forget, each followed by its alternate if
// there are any; then retain.
struct EpochPlan {
    std::vector<std::int64_t> forget;  // (P), empty where the forget set is
    std::vector<std::int64_t> retain;  // (P), empty where the retain set is
    std::vector<std::int8_t> roles;
    std::vector<std::int64_t> sequences;
    std::vector<std::int64_t> batch_offsets;
    std::vector<std::int64_t> batch_tokens;
    std::vector<std::int64_t> step_offsets;
    std::int64_t over_budget = 0;  // sequences (with their alternates) longer than token_budget; each has its own batch
};

// `alternate_lengths` is empty, or has an entry for each forget sequence, whose micro-batch the alternate shares.
// Where one of the two sets is empty, an epoch runs over the other alone.
//
// Every forget sequence comes exactly once an epoch (but for a dropped last step). Ranks have equally many
// micro-batches; their tokens in a step differ by at most the longest sequence. A rank whose share of a step is empty
// has an empty micro-batch.
//
// Throws std::invalid_argument for two empty sets, lengths below 1 or above 2^31 - 1, counts below 1, alternates or
// paired retain sequences that do not fit the forget set, and a drop_last that leaves nothing.
EpochPlan plan_epoch(std::span<const std::int64_t> forget_lengths, std::span<const std::int64_t> retain_lengths,
                     std::span<const std::int64_t> alternate_lengths, const EpochSettings& settings);

}  // namespace efface
