// The step packer: distributes the sequences of an optimizer step over ranks and micro-batches.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

#include "longest_first.hpp"
#include "open_bins.hpp"
#include "packer.hpp"
#include "planner.hpp"

namespace efface {

struct Bin {
    std::int64_t tokens = 0;   // of its units
    std::uint32_t forget = 0;  // number of forget units
    std::uint32_t retain = 0;  // number of retain units
};

// Arranges the units of one step. One packer is used for all steps, so that its buffers are reused.
class StepPacker {
  public:
    // A micro-batch has room for units of `capacity` tokens together, and `shared_tokens` in addition to them.
    StepPacker(std::int64_t capacity, std::int64_t shared_tokens, std::int64_t world_size, bool alternates)
        : capacity_(capacity),
          shared_tokens_(shared_tokens),
          alternates_(alternates),
          ranks_(static_cast<std::size_t>(world_size)) {}

    std::vector<Unit> units;  // units of the step, forget before retain; set by the caller

    // Appends the step's micro-batches to the plan: for each k, the k-th micro-batch of every rank.
    void emit(EpochPlan& plan) {
        order_.resize(units.size());
        std::iota(order_.begin(), order_.end(), UnitIndex{0});
        if (ranks_.size() > 1 || tokens_of(order_) > capacity_) {  // otherwise one micro-batch contains all units
            longest_first_(order_, units);
        }
        share();
        bin_of_.resize(units.size());
        bins_.clear();
        std::size_t most = 0;
        for (Rank& rank : ranks_) {
            rank.bins.clear();
            pack(rank);
            most = std::max(most, rank.bins.size());
        }
        for (Rank& rank : ranks_) {
            level(rank, most);
        }
        write(plan, most);
    }

  private:
    struct Rank {
        std::vector<UnitIndex> units;  // longest first
        std::vector<BinIndex> bins;    // its micro-batches
    };

    // Assigns units to ranks, longest first, each to the rank with the fewest tokens. The sums of the ranks then differ
    // by at most the longest unit.
    void share() {
        if (ranks_.size() == 1) {
            std::swap(ranks_[0].units, order_);
            return;
        }
        using Load = std::pair<std::int64_t, std::size_t>;  // tokens, rank
        std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
        for (std::size_t rank = 0; rank < ranks_.size(); ++rank) {
            ranks_[rank].units.clear();
            loads.emplace(0, rank);
        }
        for (const UnitIndex unit : order_) {
            const auto [tokens, rank] = loads.top();
            loads.pop();
            ranks_[rank].units.push_back(unit);
            loads.emplace(tokens + units[unit].tokens, rank);
        }
    }

    [[nodiscard]] std::int64_t tokens_of(const std::vector<UnitIndex>& some) const {
        std::int64_t total = 0;
        for (const UnitIndex unit : some) {
            total += units[unit].tokens;
        }
        return total;
    }

    void add(UnitIndex unit, BinIndex bin) {
        bin_of_[unit] = bin;
        bins_[bin].tokens += units[unit].tokens;
        ++(units[unit].role == Role::forget ? bins_[bin].forget : bins_[bin].retain);
    }

    BinIndex new_bin(Rank& rank) {
        bins_.emplace_back();
        rank.bins.push_back(static_cast<BinIndex>(bins_.size() - 1));
        return rank.bins.back();
    }

    // Best-fit decreasing: puts each unit into the fullest micro-batch with enough room. A unit that fits into none
    // opens a new one, so a unit longer than the capacity is alone in its micro-batch.
    void pack(Rank& rank) {
        if (tokens_of(rank.units) <= capacity_) {
            const BinIndex all = rank.units.empty() ? 0 : new_bin(rank);
            for (const UnitIndex unit : rank.units) {
                add(unit, all);
            }
            return;
        }
        open_.reset(units[rank.units.front()].tokens);
        for (const UnitIndex unit : rank.units) {
            const std::int64_t tokens = units[unit].tokens;
            std::int64_t room = capacity_;
            BinIndex bin = open_.take(tokens, room);
            if (bin == OpenBins::nobody) {
                bin = new_bin(rank);
                room = capacity_;
            }
            add(unit, bin);
            if (room > tokens) {
                open_.put(bin, room - tokens);
            }
        }
        open_.clear();
    }

    // Extends a rank to `count` micro-batches: repeatedly splits its largest micro-batch that has more than one unit,
    // or adds an empty one if none has.
    void level(Rank& rank, std::size_t count) {
        while (rank.bins.size() < count) {
            const auto divisible = [&](BinIndex bin) {
                return bins_[bin].forget + bins_[bin].retain > 1 ? bins_[bin].tokens : -1;
            };
            const auto largest = std::ranges::max_element(rank.bins, {}, divisible);
            const bool halve = largest != rank.bins.end() && divisible(*largest) > 0;
            const BinIndex whole = halve ? *largest : 0;
            const BinIndex half = new_bin(rank);
            if (!halve) {
                continue;
            }
            bins_[whole] = {};
            for (const UnitIndex unit : rank.units) {
                if (bin_of_[unit] == whole) {
                    add(unit, bins_[half].tokens < bins_[whole].tokens ? half : whole);
                }
            }
        }
        // The fullest micro-batches first, so that small and empty ones are at the end.
        std::ranges::stable_sort(rank.bins, std::greater<>{}, [&](BinIndex bin) { return bins_[bin].tokens; });
    }

    void write(EpochPlan& plan, std::size_t count) {
        cursors_.resize(bins_.size());
        const std::size_t copies = alternates_ ? 2 : 1;  // a forget unit has one or two sequences
        auto at = static_cast<std::size_t>(plan.batch_offsets.back());
        for (std::size_t k = 0; k < count; ++k) {
            for (const Rank& rank : ranks_) {
                const Bin& bin = bins_[rank.bins[k]];
                cursors_[rank.bins[k]] = {at, at + bin.forget * copies};
                at += bin.forget * copies + bin.retain;
                plan.batch_offsets.push_back(static_cast<std::int64_t>(at));
                plan.batch_tokens.push_back(bin.tokens == 0 ? 0 : bin.tokens + shared_tokens_);
            }
        }
        plan.step_offsets.push_back(static_cast<std::int64_t>(plan.batch_tokens.size()));
        plan.roles.resize(at);
        plan.sequences.resize(at);
        const auto put = [&](std::size_t position, Role role, std::int64_t sequence) {
            plan.roles[position] = static_cast<std::int8_t>(role);
            plan.sequences[position] = sequence;
        };
        for (UnitIndex i = 0; i < units.size(); ++i) {
            const Unit& unit = units[i];
            auto& [forget, retain] = cursors_[bin_of_[i]];
            if (unit.role == Role::retain) {
                put(retain++, Role::retain, unit.sequence);
                continue;
            }
            put(forget++, Role::forget, unit.sequence);
            if (alternates_) {
                put(forget++, Role::alternate, unit.sequence);
            }
        }
    }

    struct Cursors {
        std::size_t forget;  // also for alternates
        std::size_t retain;
    };

    std::int64_t capacity_;
    std::int64_t shared_tokens_;
    bool alternates_;
    std::vector<UnitIndex> order_;
    std::vector<Rank> ranks_;
    std::vector<BinIndex> bin_of_;  // bin of each unit
    std::vector<Bin> bins_;         // bins of all ranks
    std::vector<Cursors> cursors_;  // for each bin, the positions of its next sequences
    LongestFirst longest_first_;
    OpenBins open_;
};

}  // namespace efface
