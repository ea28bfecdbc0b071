#include "planner.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>

#include "counter_random.hpp"
#include "refuse.hpp"
#include "step_packer.hpp"

namespace efface {
namespace {

using Lengths = std::span<const std::int64_t>;
using Indices = std::vector<std::int64_t>;

constexpr std::int64_t longest = std::numeric_limits<std::int32_t>::max();  // maximum tokens of a sequence

enum Stream : std::uint64_t { epoch_order = 1, random_retain = 2, retain_round = 3 };

void check_lengths(Lengths lengths, std::string_view name) {
    const auto wrong = [](std::int64_t n) { return static_cast<std::uint64_t>(n) - 1 >= std::uint64_t{longest}; };
    bool any = false;
    for (const std::int64_t n : lengths) {  // without a branch, so that compilers vectorise the loop
        any |= wrong(n);
    }
    if (any) {
        const auto bad = std::ranges::find_if(lengths, wrong);
        refuse(quoted(name) + ": expected lengths in 1 .. 2^31 - 1, got " + std::to_string(*bad) + " at position " +
               std::to_string(bad - lengths.begin()));
    }
}

void check_range(std::int64_t value, std::int64_t low, std::int64_t high, std::string_view name) {
    if (value < low || value > high) {
        refuse(quoted(name) + ": expected " + std::to_string(low) + " .. " + std::to_string(high) + ", got " +
               std::to_string(value));
    }
}

void check(Lengths forget, Lengths retain, Lengths alternates, const EpochSettings& settings) {
    check_range(settings.pairs_per_step, 1, std::numeric_limits<std::int32_t>::max(), "pairs_per_step");
    check_range(settings.token_budget, 1, longest, "token_budget");
    check_range(settings.shared_tokens, 0, longest, "shared_tokens");
    check_range(settings.world_size, 1, 1 << 16, "world_size");
    check_lengths(forget, "forget_lengths");
    check_lengths(retain, "retain_lengths");
    check_lengths(alternates, "alternates");
    if (forget.empty() && retain.empty()) {
        refuse("`forget_lengths`, `retain_lengths`: expected at least one sequence, got two empty sets");
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
        refuse("`drop_last`: expected at least one full step of " + std::to_string(settings.pairs_per_step) +
               " pairs, got an epoch of " + std::to_string(pairs) + "; lower pairs_per_step or keep the last step");
    }
}

void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#endif
}

// Returns 0 .. count - 1, shuffled (Fisher and Yates); each draw is a function of its position.
Indices shuffled(std::size_t count, CounterRandom random) {
    Indices order(count);
    std::iota(order.begin(), order.end(), std::int64_t{0});
    for (std::size_t i = count; i > 1; --i) {
        std::swap(order[i - 1], order[random.below(i - 1, i)]);
    }
    return order;
}

// Returns the retain sequence of each pair of the epoch; forget[i] is the forget sequence of pair i.
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
            // Pair i of epoch e is draw number e * P + i of the run, modulo 2^64, which no run reaches.
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
    // Without room beside the shared tokens, every unit is over budget and gets its own micro-batch.
    const std::int64_t capacity = std::max<std::int64_t>(settings.token_budget - settings.shared_tokens, 0);
    StepPacker packer(capacity, settings.shared_tokens, settings.world_size, alternates);
    for (std::size_t first = 0; first < pairs; first += per_step) {
        packer.units.clear();
        const auto add = [&](Role role, const Indices& indices, Lengths lengths, Lengths more) {
            const std::size_t last = std::min(first + per_step, indices.size());
            for (std::size_t i = first; i < last; ++i) {
                const auto index = static_cast<std::size_t>(indices[i]);
                const std::int64_t tokens = lengths[index] + (more.empty() ? 0 : more[index]);
                plan.over_budget += tokens > capacity ? 1 : 0;
                packer.units.push_back({role, indices[i], tokens});
            }
            // Prefetch the lengths of the next step, which are scattered in memory, while this step is packed.
            for (std::size_t i = last; i < std::min(last + per_step, indices.size()); ++i) {
                prefetch(&lengths[static_cast<std::size_t>(indices[i])]);
            }
        };
        add(Role::forget, plan.forget, forget_lengths, alternate_lengths);
        add(Role::retain, plan.retain, retain_lengths, {});
        packer.emit(plan);
    }
    return plan;
}

}  // namespace efface
