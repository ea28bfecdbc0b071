#include "planner.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "counter_random.hpp"
#include "refuse.hpp"

namespace efface {
namespace {

using Lengths = std::span<const std::int64_t>;
using Indices = std::vector<std::int64_t>;

constexpr std::int64_t longest = std::numeric_limits<std::int32_t>::max();

enum Stream : std::uint64_t { epoch_order = 1, random_retain = 2, retain_round = 3 };

void check_lengths(Lengths lengths, std::string_view name) {
    const auto bad = std::ranges::find_if(lengths, [](std::int64_t n) { return n < 1 || n > longest; });
    if (bad != lengths.end()) {
        refuse(quoted(name) + ": expected lengths in 1 .. 2^31 - 1, got " + std::to_string(*bad) + " at position " +
               std::to_string(bad - lengths.begin()));
    }
}

void check_range(std::int64_t value, std::int64_t high, std::string_view name) {
    if (value < 1 || value > high) {
        refuse(quoted(name) + ": expected 1 .. " + std::to_string(high) + ", got " + std::to_string(value));
    }
}

void check(Lengths forget, Lengths retain, Lengths alternates, const EpochSettings& settings) {
    check_range(settings.pairs_per_step, std::numeric_limits<std::int32_t>::max(), "pairs_per_step");
    check_range(settings.token_budget, longest, "token_budget");
    check_range(settings.world_size, 1 << 16, "world_size");
    check_lengths(forget, "forget_lengths");
    check_lengths(retain, "retain_lengths");
    check_lengths(alternates, "alternates");
    if (forget.empty() && retain.empty()) {
        refuse("`forget_lengths` and `retain_lengths`: both are empty; there is nothing to plan");
    }
    if (!alternates.empty() && alternates.size() != forget.size()) {
        refuse("`alternates`: expected " + std::to_string(forget.size()) +
               " lengths, one for each forget sequence, got " + std::to_string(alternates.size()));
    }
    if (settings.retain_sampling == RetainSampling::paired && !forget.empty() && !retain.empty() &&
        retain.size() != forget.size()) {
        refuse("`retain_sampling` \"paired\": expected as many retain as forget sequences, got " +
               std::to_string(retain.size()) + " and " + std::to_string(forget.size()) +
               "; use \"random\" or \"cycle\"");
    }
    const auto pairs = static_cast<std::int64_t>(forget.empty() ? retain.size() : forget.size());
    if (settings.drop_last && pairs < settings.pairs_per_step) {
        refuse("`drop_last`: an epoch of " + std::to_string(pairs) + " pairs has no whole step of " +
               std::to_string(settings.pairs_per_step) + "; lower pairs_per_step or keep the last step");
    }
}

// A shuffled 0 .. count - 1 (Fisher and Yates), each draw a function of its position.
Indices shuffled(std::size_t count, CounterRandom random) {
    Indices order(count);
    std::iota(order.begin(), order.end(), std::int64_t{0});
    for (std::size_t i = count; i > 1; --i) {
        std::swap(order[i - 1], order[random.below(i - 1, i)]);
    }
    return order;
}

// The retain sequence of each of the epoch's pairs; forget[i] is the forget sequence of pair i.
Indices draw_retain(const Indices& forget, std::size_t count, const EpochSettings& settings) {
    Indices drawn(forget.size());
    switch (settings.retain_sampling) {
        case RetainSampling::random: {
            CounterRandom random(settings.seed, random_retain, settings.epoch);
            for (std::size_t i = 0; i < drawn.size(); ++i) {
                drawn[i] = static_cast<std::int64_t>(random.below(i, count));
            }
            break;
        }
        case RetainSampling::cycle: {
            // Pair i of epoch e is draw number e * P + i of the run; modulo 2^64, where no run gets.
            const std::uint64_t first = settings.epoch * forget.size();
            for (std::size_t i = 0; i < drawn.size();) {
                const std::uint64_t round = (first + i) / count;
                const Indices order = shuffled(count, CounterRandom(settings.seed, retain_round, round));
                for (std::size_t at = (first + i) % count; at < count && i < drawn.size(); ++at, ++i) {
                    drawn[i] = order[at];
                }
            }
            break;
        }
        case RetainSampling::paired:
            drawn = forget;
            break;
    }
    return drawn;
}

// What travels together: a forget sequence with its alternate, or a retain sequence.
struct Unit {
    Role role;
    std::int64_t sequence;
    std::int64_t tokens;
};

struct Bin {
    std::int64_t tokens = 0;
    std::vector<std::uint32_t> units;

    void add(std::uint32_t unit, std::int64_t length) {
        units.push_back(unit);
        tokens += length;
    }
};

// Arranges the units of one step. Kept from step to step, so that its buffers are.
class StepPacker {
  public:
    StepPacker(std::int64_t token_budget, std::int64_t world_size)
        : budget_(token_budget), ranks_(static_cast<std::size_t>(world_size)) {}

    std::vector<Unit> units;  // of the step, in order: the caller fills it

    // Appends the step's micro-batches to the plan: the k-th of every rank, for each k.
    void emit(EpochPlan& plan, bool alternates) {
        split();
        std::size_t most = 0;
        for (std::size_t rank = 0; rank < ranks_.size(); ++rank) {
            pack(rank);
            most = std::max(most, bins_[rank].size());
        }
        for (auto& bins : bins_) {
            level(bins, most);
        }
        for (std::size_t k = 0; k < most; ++k) {
            for (auto& bins : bins_) {
                write(bins[k], plan, alternates);
            }
        }
        plan.step_offsets.push_back(static_cast<std::int64_t>(plan.batch_tokens.size()));
    }

  private:
    // Longest first, each to the rank with the fewest tokens: the ranks' sums differ by at most the longest unit.
    void split() {
        order_.clear();
        for (std::uint32_t i = 0; i < units.size(); ++i) {
            // One key: descending length, then position. A unit has at most two sequences, so 33 bits are enough.
            order_.push_back({(std::int64_t{1} << 33) - units[i].tokens, i});
        }
        std::ranges::sort(order_);
        for (auto& rank : ranks_) {
            rank.clear();
        }
        if (ranks_.size() == 1) {
            for (const auto& [_, unit] : order_) {
                ranks_[0].push_back(unit);
            }
            return;
        }
        using Load = std::pair<std::int64_t, std::size_t>;  // tokens, rank
        std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
        for (std::size_t rank = 0; rank < ranks_.size(); ++rank) {
            loads.emplace(0, rank);
        }
        for (const auto& [_, unit] : order_) {
            const auto [tokens, rank] = loads.top();
            loads.pop();
            ranks_[rank].push_back(unit);
            loads.emplace(tokens + units[unit].tokens, rank);
        }
    }

    // Best-fit decreasing: each unit into the fullest micro-batch that still has room. What fits nowhere opens a new
    // one, so a unit longer than the budget is alone.
    void pack(std::size_t rank) {
        bins_.resize(ranks_.size());
        auto& bins = bins_[rank];
        bins.clear();
        open_.clear();
        for (const std::uint32_t unit : ranks_[rank]) {
            const std::int64_t tokens = units[unit].tokens;
            const auto fit = open_.lower_bound({tokens, 0});
            if (fit == open_.end()) {
                bins.emplace_back().add(unit, tokens);
                if (budget_ > tokens) {
                    open_.emplace(budget_ - tokens, bins.size() - 1);
                }
                continue;
            }
            bins[fit->second].add(unit, tokens);
            auto node = open_.extract(fit);
            node.value().first -= tokens;
            if (node.value().first > 0) {
                open_.insert(std::move(node));
            }
        }
    }

    // Brings a rank to `count` micro-batches: halves its largest one that can be halved, else adds an empty one.
    void level(std::vector<Bin>& bins, std::size_t count) {
        while (bins.size() < count) {
            Bin* largest = nullptr;
            for (Bin& bin : bins) {
                if (bin.units.size() > 1 && (largest == nullptr || bin.tokens > largest->tokens)) {
                    largest = &bin;
                }
            }
            Bin whole;
            Bin half;
            if (largest != nullptr) {
                std::swap(whole, *largest);
                for (const std::uint32_t unit : whole.units) {
                    (half.tokens < largest->tokens ? half : *largest).add(unit, units[unit].tokens);
                }
            }
            bins.push_back(std::move(half));
        }
        // The fullest first, so that what is left over stands at the end.
        std::ranges::stable_sort(bins, std::greater<>{}, &Bin::tokens);
    }

    void write(Bin& bin, EpochPlan& plan, bool alternates) {
        std::ranges::sort(bin.units);  // units stand in order: forget before retain
        const auto put = [&](Role role, std::int64_t sequence) {
            plan.roles.push_back(static_cast<std::int8_t>(role));
            plan.sequences.push_back(sequence);
        };
        const auto retain = std::ranges::find(bin.units, Role::retain, [&](auto unit) { return units[unit].role; });
        for (auto unit = bin.units.begin(); unit != retain; ++unit) {
            put(Role::forget, units[*unit].sequence);
        }
        for (auto unit = bin.units.begin(); alternates && unit != retain; ++unit) {
            put(Role::alternate, units[*unit].sequence);
        }
        for (auto unit = retain; unit != bin.units.end(); ++unit) {
            put(Role::retain, units[*unit].sequence);
        }
        plan.batch_offsets.push_back(static_cast<std::int64_t>(plan.roles.size()));
        plan.batch_tokens.push_back(bin.tokens);
    }

    std::int64_t budget_;
    std::vector<std::pair<std::int64_t, std::uint32_t>> order_;
    std::vector<std::vector<std::uint32_t>> ranks_;        // the units of each rank, longest first
    std::vector<std::vector<Bin>> bins_;                   // the micro-batches of each rank
    std::set<std::pair<std::int64_t, std::size_t>> open_;  // (room left, micro-batch)
};

}  // namespace

EpochPlan plan_epoch(Lengths forget_lengths, Lengths retain_lengths, Lengths alternate_lengths,
                     const EpochSettings& settings) {
    check(forget_lengths, retain_lengths, alternate_lengths, settings);
    const auto per_step = static_cast<std::size_t>(settings.pairs_per_step);
    Indices order = shuffled(forget_lengths.empty() ? retain_lengths.size() : forget_lengths.size(),
                             CounterRandom(settings.seed, epoch_order, settings.epoch));
    if (settings.drop_last) {
        order.resize(order.size() - order.size() % per_step);
    }
    const std::size_t pairs = order.size();
    EpochPlan plan;
    if (forget_lengths.empty()) {
        plan.retain = std::move(order);
    } else {
        plan.forget = std::move(order);
        if (!retain_lengths.empty()) {
            plan.retain = draw_retain(plan.forget, retain_lengths.size(), settings);
        }
    }
    const bool alternates = !alternate_lengths.empty();
    const std::size_t items = plan.forget.size() * (alternates ? 2 : 1) + plan.retain.size();
    plan.roles.reserve(items);
    plan.sequences.reserve(items);
    plan.batch_offsets.push_back(0);
    plan.step_offsets.push_back(0);
    StepPacker packer(settings.token_budget, settings.world_size);
    for (std::size_t first = 0; first < pairs; first += per_step) {
        const auto add = [&](Role role, const Indices& indices, const auto& tokens_of) {
            for (std::size_t i = first; i < std::min(first + per_step, indices.size()); ++i) {
                const std::int64_t tokens = tokens_of(static_cast<std::size_t>(indices[i]));
                plan.over_budget += tokens > settings.token_budget ? 1 : 0;
                packer.units.push_back({role, indices[i], tokens});
            }
        };
        packer.units.clear();
        add(Role::forget, plan.forget,
            [&](std::size_t i) { return forget_lengths[i] + (alternates ? alternate_lengths[i] : 0); });
        add(Role::retain, plan.retain, [&](std::size_t i) { return retain_lengths[i]; });
        packer.emit(plan, alternates);
    }
    return plan;
}

}  // namespace efface
