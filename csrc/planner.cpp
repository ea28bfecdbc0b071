#include "planner.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <string>
#include <string_view>
#include <utility>

#include "counter_random.hpp"
#include "refuse.hpp"

namespace efface {
namespace {

using Lengths = std::span<const std::int64_t>;
using Indices = std::vector<std::int64_t>;

constexpr std::int64_t longest = std::numeric_limits<std::int32_t>::max();  // tokens of a sequence

enum Stream : std::uint64_t { epoch_order = 1, random_retain = 2, retain_round = 3 };

void check_lengths(Lengths lengths, std::string_view name) {
    const auto wrong = [](std::int64_t n) { return static_cast<std::uint64_t>(n) - 1 >= std::uint64_t{longest}; };
    bool any = false;
    for (const std::int64_t n : lengths) {  // without a branch, so that compilers vectorise it
        any |= wrong(n);
    }
    if (any) {
        const auto bad = std::ranges::find_if(lengths, wrong);
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

void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#endif
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

using UnitIndex = std::uint32_t;
using BinIndex = std::uint32_t;

// Sorts indices by descending tokens, ties in their order: a radix sort, because comparing mispredicts half its
// branches.
class LongestFirst {
  public:
    void operator()(std::vector<UnitIndex>& order, const std::vector<Unit>& units) {
        std::int64_t top = 0;
        std::int64_t bottom = std::numeric_limits<std::int64_t>::max();
        for (const UnitIndex unit : order) {
            top = std::max(top, units[unit].tokens);
            bottom = std::min(bottom, units[unit].tokens);
        }
        other_.resize(order.size());
        for (int shift = 0; shift < 64 && ((top - bottom) >> shift) > 0; shift += 8) {
            std::array<UnitIndex, 257> starts{};
            const auto digit = [&](UnitIndex unit) {
                return static_cast<std::size_t>((top - units[unit].tokens) >> shift) & 255U;
            };
            for (const UnitIndex unit : order) {
                ++starts[digit(unit) + 1];
            }
            std::partial_sum(starts.begin(), starts.end(), starts.begin());
            for (const UnitIndex unit : order) {
                other_[starts[digit(unit)]++] = unit;
            }
            std::swap(order, other_);
        }
    }

  private:
    std::vector<UnitIndex> other_;
};

// The micro-batches that still have room, for best-fit: put and take cost a few instructions, however many there are.
//
// Rooms fall into at most 2^16 classes, each a stack, and a bit set says which are not empty. A class is one room where
// no sequence has more than 2^16 tokens; for longer ones it is a range of rooms, and best-fit is best to within that
// range.
class OpenBins {
  public:
    OpenBins() : heads_(classes, nobody), words_(classes / 64), summary_(classes / 4096) {}

    // For sequences of up to `longest_unit` tokens. A bin with more room than that is kept apart: there is one at most,
    // the newest, because a new one is opened only where no other has room.
    void reset(std::int64_t longest_unit) {
        shift_ = std::max(0, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(longest_unit))) - 16);
        limit_ = longest_unit;
        fresh_ = nobody;
    }

    void put(BinIndex bin, std::int64_t room) {
        if (room > limit_) {
            fresh_ = bin;
            fresh_room_ = room;
            return;
        }
        const auto c = static_cast<std::size_t>(room >> shift_);
        if (rooms_.size() <= bin) {
            rooms_.resize(bin + 1);
            below_.resize(bin + 1);
        }
        rooms_[bin] = room;
        below_[bin] = std::exchange(heads_[c], bin);
        words_[c / 64] |= bit(c);
        summary_[c / 4096] |= bit(c / 64);
        ++held_;
    }

    // Takes out the fullest bin with room for `tokens` (and says how much room it has), or nobody.
    BinIndex take(std::int64_t tokens, std::int64_t& room) {
        auto c = static_cast<std::size_t>(tokens >> shift_);
        // Where a class is a range, its first bin may have too little room; in all later classes every bin fits.
        if (shift_ > 0 && heads_[c] != nobody && rooms_[heads_[c]] < tokens) {
            ++c;
        }
        c = held_ == 0 ? classes : next(c);  // most steps need few micro-batches, and hold none in the classes
        if (c == classes) {
            room = fresh_room_;
            return fresh_ != nobody && fresh_room_ >= tokens ? std::exchange(fresh_, nobody) : nobody;
        }
        const BinIndex bin = heads_[c];
        room = rooms_[bin];
        pop(c);
        return bin;
    }

    // Empties the classes again; costs what is in them.
    void clear() {
        for (std::size_t c = held_ == 0 ? classes : next(0); c != classes; c = next(c)) {
            heads_[c] = nobody;
            forget(c);
        }
        held_ = 0;
    }

    static constexpr BinIndex nobody = std::numeric_limits<BinIndex>::max();

  private:
    static constexpr std::size_t classes = 1 << 16;

    static std::uint64_t bit(std::size_t i) { return std::uint64_t{1} << (i % 64); }

    void pop(std::size_t c) {
        heads_[c] = below_[heads_[c]];
        --held_;
        if (heads_[c] == nobody) {
            forget(c);
        }
    }

    void forget(std::size_t c) {
        words_[c / 64] &= ~bit(c);
        if (words_[c / 64] == 0) {
            summary_[c / 4096] &= ~bit(c / 64);
        }
    }

    // The first class from c on that is not empty, or `classes`.
    [[nodiscard]] std::size_t next(std::size_t c) const {
        if (c >= classes) {
            return classes;
        }
        if (const std::uint64_t rest = words_[c / 64] >> (c % 64); rest != 0) {
            return c + static_cast<std::size_t>(std::countr_zero(rest));
        }
        const std::size_t word = c / 64 + 1;
        for (std::size_t s = word / 64; s < summary_.size(); ++s) {
            const std::uint64_t set = s == word / 64 ? summary_[s] & (~std::uint64_t{0} << (word % 64)) : summary_[s];
            if (set != 0) {
                const std::size_t found = s * 64 + static_cast<std::size_t>(std::countr_zero(set));
                return found * 64 + static_cast<std::size_t>(std::countr_zero(words_[found]));
            }
        }
        return classes;
    }

    int shift_ = 0;
    std::int64_t limit_ = 0;
    BinIndex fresh_ = nobody;
    std::int64_t fresh_room_ = 0;
    std::size_t held_ = 0;         // bins in the classes
    std::vector<BinIndex> heads_;  // of each class
    std::vector<BinIndex> below_;  // of each bin, in its class
    std::vector<std::int64_t> rooms_;
    std::vector<std::uint64_t> words_;    // a bit for each class
    std::vector<std::uint64_t> summary_;  // a bit for each word
};

struct Bin {
    std::int64_t tokens = 0;
    std::uint32_t forget = 0;  // units of each kind
    std::uint32_t retain = 0;
};

// Arranges the units of one step. Kept from step to step, so that its buffers are.
class StepPacker {
  public:
    StepPacker(std::int64_t token_budget, std::int64_t world_size, bool alternates)
        : budget_(token_budget), alternates_(alternates), ranks_(static_cast<std::size_t>(world_size)) {}

    std::vector<Unit> units;  // of the step, forget before retain: the caller fills it

    // Appends the step's micro-batches to the plan: the k-th of every rank, for each k.
    void emit(EpochPlan& plan) {
        order_.resize(units.size());
        std::iota(order_.begin(), order_.end(), UnitIndex{0});
        if (ranks_.size() > 1 || tokens_of(order_) > budget_) {  // else one micro-batch takes all, in any order
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

    // The longest first, each to the rank with the fewest tokens: the ranks' sums differ by at most the longest unit.
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

    // Best-fit decreasing: each unit into the fullest micro-batch that still has room. What fits nowhere opens a new
    // one, so a unit longer than the budget is alone.
    void pack(Rank& rank) {
        if (tokens_of(rank.units) <= budget_) {
            const BinIndex all = rank.units.empty() ? 0 : new_bin(rank);
            for (const UnitIndex unit : rank.units) {
                add(unit, all);
            }
            return;
        }
        open_.reset(units[rank.units.front()].tokens);
        for (const UnitIndex unit : rank.units) {
            const std::int64_t tokens = units[unit].tokens;
            std::int64_t room = budget_;
            BinIndex bin = open_.take(tokens, room);
            if (bin == OpenBins::nobody) {
                bin = new_bin(rank);
                room = budget_;
            }
            add(unit, bin);
            if (room > tokens) {
                open_.put(bin, room - tokens);
            }
        }
        open_.clear();
    }

    // Brings a rank to `count` micro-batches: halves its largest one that can be halved, else adds an empty one.
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
        // The fullest first, so that what is left over stands at the end.
        std::ranges::stable_sort(rank.bins, std::greater<>{}, [&](BinIndex bin) { return bins_[bin].tokens; });
    }

    void write(EpochPlan& plan, std::size_t count) {
        cursors_.resize(bins_.size());
        const std::size_t copies = alternates_ ? 2 : 1;  // a forget unit is one sequence or two
        auto at = static_cast<std::size_t>(plan.batch_offsets.back());
        for (std::size_t k = 0; k < count; ++k) {
            for (const Rank& rank : ranks_) {
                const Bin& bin = bins_[rank.bins[k]];
                cursors_[rank.bins[k]] = {at, at + bin.forget * copies};
                at += bin.forget * copies + bin.retain;
                plan.batch_offsets.push_back(static_cast<std::int64_t>(at));
                plan.batch_tokens.push_back(bin.tokens);
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
            if (alternates_) {
                put(forget + bins_[bin_of_[i]].forget, Role::alternate, unit.sequence);
            }
            put(forget++, Role::forget, unit.sequence);
        }
    }

    struct Cursors {
        std::size_t forget;
        std::size_t retain;
    };

    std::int64_t budget_;
    bool alternates_;
    std::vector<UnitIndex> order_;
    std::vector<Rank> ranks_;
    std::vector<BinIndex> bin_of_;  // of each unit
    std::vector<Bin> bins_;         // of all ranks
    std::vector<Cursors> cursors_;  // of each bin: where its next sequences go
    LongestFirst longest_first_;
    OpenBins open_;
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
    StepPacker packer(settings.token_budget, settings.world_size, alternates);
    for (std::size_t first = 0; first < pairs; first += per_step) {
        packer.units.clear();
        const auto add = [&](Role role, const Indices& indices, Lengths lengths, Lengths more) {
            const std::size_t last = std::min(first + per_step, indices.size());
            for (std::size_t i = first; i < last; ++i) {
                const auto index = static_cast<std::size_t>(indices[i]);
                const std::int64_t tokens = lengths[index] + (more.empty() ? 0 : more[index]);
                plan.over_budget += tokens > settings.token_budget ? 1 : 0;
                packer.units.push_back({role, indices[i], tokens});
            }
            // The next step's lengths lie all over memory: they arrive while this step is packed.
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
