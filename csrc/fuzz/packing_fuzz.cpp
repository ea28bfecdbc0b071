// Differential fuzzing of the packer against a naive packer, and of the planner against its invariants, with invalid
// stores.
#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fuzz.hpp"
#include "packer.hpp"
#include "planner.hpp"

namespace {

using fuzz::Bytes;
using fuzz::expect;

// Arrays of one chunk, allocated in their exact sizes, so that the sanitizer detects reads beyond their ends.
struct Chunk {
    std::vector<std::int32_t> ids;
    std::vector<std::int64_t> offsets;
    std::vector<std::int64_t> label_starts;
};

std::int64_t hostile(Bytes& bytes) {
    constexpr std::array extremes{std::numeric_limits<std::int64_t>::min(), std::numeric_limits<std::int64_t>::max(),
                                  std::int64_t{-1}, std::int64_t{1} << 32};
    return extremes[static_cast<std::size_t>(bytes.below(extremes.size()))];
}

Chunk chunk_of(Bytes& bytes) {
    Chunk chunk;
    std::int64_t at = bytes.below(3);
    chunk.offsets.push_back(at);
    for (std::int64_t left = bytes.below(5); left > 0; --left) {
        const std::int64_t length = bytes.below(12);
        at += length;
        chunk.offsets.push_back(at);
        chunk.label_starts.push_back(bytes.below(length + 2));
    }
    chunk.ids.resize(static_cast<std::size_t>(at));
    std::ranges::generate(chunk.ids, [&] { return bytes.next(); });
    // In one input of four, one entry is replaced and can be invalid.
    if (bytes.below(4) == 0) {
        auto& victim = bytes.below(2) == 0 ? chunk.offsets : chunk.label_starts;
        if (!victim.empty()) {
            std::int64_t& entry =
                victim[static_cast<std::size_t>(bytes.below(static_cast<std::int64_t>(victim.size())))];
            // an extreme value, or a small offset that can leave the arrays
            entry = bytes.below(2) == 0 ? hostile(bytes) : entry + bytes.below(20) - 10;
        }
    }
    return chunk;
}

struct Batch {
    std::vector<std::int64_t> input_ids, position_ids, label_rows, targets, row_offsets{0};
    std::vector<std::int32_t> cu_seqlens{0};
};

// A naive packer, token by token. Returns nothing if the input must be refused.
std::optional<Batch> naive(const std::vector<std::vector<Chunk>>& stores, const std::vector<std::int8_t>& roles,
                           const std::vector<std::int64_t>& sequences) {
    Batch out;
    for (std::size_t s = 0; s < roles.size(); ++s) {
        if (roles[s] < 0 || roles[s] >= static_cast<int>(stores.size()) || sequences[s] < 0) {
            return {};
        }
        std::int64_t index = sequences[s];
        const Chunk* found = nullptr;
        for (const Chunk& chunk : stores[static_cast<std::size_t>(roles[s])]) {
            const auto count = static_cast<std::int64_t>(chunk.label_starts.size());
            if (index < count) {
                found = &chunk;
                break;
            }
            index -= count;
        }
        if (found == nullptr) {
            return {};
        }
        const auto i = static_cast<std::size_t>(index);
        const std::int64_t begin = found->offsets[i];
        const std::int64_t end = found->offsets[i + 1];
        const std::int64_t start = found->label_starts[i];
        if (begin < 0 || end < begin || end > static_cast<std::int64_t>(found->ids.size()) || start < 0) {
            return {};
        }
        bool labelled = false;
        for (std::int64_t at = begin; at < end; ++at) {
            const std::int64_t position = at - begin;
            if (position > 0 && position >= start) {
                out.label_rows.push_back(static_cast<std::int64_t>(out.input_ids.size()) - 1);
                out.targets.push_back(found->ids[static_cast<std::size_t>(at)]);
                labelled = true;
            }
            out.input_ids.push_back(found->ids[static_cast<std::size_t>(at)]);
            out.position_ids.push_back(position);
        }
        if (!labelled) {
            return {};
        }
        out.cu_seqlens.push_back(static_cast<std::int32_t>(out.input_ids.size()));
        out.row_offsets.push_back(static_cast<std::int64_t>(out.targets.size()));
    }
    return out;
}

void compare_packers(Bytes& bytes) {
    std::vector<std::vector<Chunk>> chunks(static_cast<std::size_t>(1 + bytes.below(3)));
    std::vector<efface::TokenStore> stores;
    for (auto& own : chunks) {
        std::vector<efface::TokenChunk> lent;
        own.resize(static_cast<std::size_t>(bytes.below(4)));
        for (Chunk& chunk : own) {
            chunk = chunk_of(bytes);
            lent.push_back({chunk.ids, chunk.offsets, chunk.label_starts});
        }
        stores.emplace_back("store", std::move(lent));
    }
    std::vector<const efface::TokenStore*> lent;
    for (const auto& store : stores) {
        lent.push_back(&store);
    }
    std::vector<std::int8_t> roles;
    std::vector<std::int64_t> sequences;
    for (std::int64_t left = bytes.below(10); left > 0; --left) {
        const std::int64_t role = bytes.below(static_cast<std::int64_t>(stores.size()));
        const std::int64_t size = stores[static_cast<std::size_t>(role)].size();
        roles.push_back(static_cast<std::int8_t>(bytes.below(30) == 0 ? bytes.below(9) - 4 : role));
        sequences.push_back(bytes.below(30) == 0 || size == 0 ? hostile(bytes) : bytes.below(size));
    }
    const std::optional<Batch> expected = naive(chunks, roles, sequences);

    const efface::Choice choice{roles, sequences};
    std::optional<efface::PackSize> size;
    try {
        size = efface::measure(lent, choice);
    } catch (const std::invalid_argument&) {  // the naive packer must refuse the input too, see below
    }
    expect(size.has_value() == expected.has_value(), "measure and the naive packer disagree on refusing the input");
    if (!size) {
        return;
    }
    std::vector<std::int64_t> storage(static_cast<std::size_t>(efface::storage_words(*size)), -77);
    const efface::PackedLengths packed = efface::pack(lent, choice, storage);
    const efface::PackedParts got = efface::parts_of(storage, *size);
    expect(std::ranges::equal(got.input_ids, expected->input_ids), "input_ids");
    expect(std::ranges::equal(got.position_ids, expected->position_ids), "position_ids");
    expect(std::ranges::equal(got.cu_seqlens, expected->cu_seqlens), "cu_seqlens");
    expect(std::ranges::equal(got.label_rows, expected->label_rows), "label_rows");
    expect(std::ranges::equal(got.targets, expected->targets), "targets");
    expect(std::ranges::equal(got.roles, roles), "roles");
    expect(std::ranges::equal(got.sequences, sequences), "sequences");
    expect(packed.row_offsets == expected->row_offsets, "row_offsets");
    std::vector<std::int64_t> ends(packed.lengths.size());
    std::partial_sum(packed.lengths.begin(), packed.lengths.end(), ends.begin());
    expect(std::ranges::equal(ends, std::span(expected->cu_seqlens).subspan(1)), "lengths");
}

using Items = std::map<std::pair<int, std::int64_t>, int>;  // (role, sequence) -> number of occurrences

// Checks the invariants of a plan, see planner.hpp.
void check_plan(const efface::EpochPlan& plan, const std::array<std::vector<std::int64_t>, 3>& lengths,
                const efface::EpochSettings& settings) {
    std::vector<std::int64_t> times(lengths[0].size());
    for (const std::int64_t i : plan.forget) {
        ++times[static_cast<std::size_t>(i)];
    }
    expect(std::ranges::all_of(times, [&](auto n) { return n == 1 || (settings.drop_last && n == 0); }),
           "a forget sequence does not occur exactly once");
    const bool alternates = !lengths[2].empty();
    for (std::size_t step = 0; step + 1 < plan.step_offsets.size(); ++step) {
        Items want;
        const auto per_step = static_cast<std::size_t>(settings.pairs_per_step);
        std::int64_t longest = 0;
        for (std::size_t i = step * per_step; i < (step + 1) * per_step; ++i) {
            const auto add = [&](int role, std::int64_t sequence) {
                ++want[{role, sequence}];
                return lengths[static_cast<std::size_t>(role)][static_cast<std::size_t>(sequence)];
            };
            if (i < plan.forget.size()) {
                const std::int64_t own = add(0, plan.forget[i]);
                longest = std::max(longest, own + (alternates ? add(2, plan.forget[i]) : 0));
            }
            if (i < plan.retain.size()) {
                longest = std::max(longest, add(1, plan.retain[i]));
            }
        }
        Items got;
        std::vector<std::int64_t> ranks(static_cast<std::size_t>(settings.world_size));
        const auto first = static_cast<std::size_t>(plan.step_offsets[step]);
        const auto last = static_cast<std::size_t>(plan.step_offsets[step + 1]);
        expect((last - first) % ranks.size() == 0, "ranks have different numbers of micro-batches");
        for (std::size_t b = first; b < last; ++b) {
            std::int64_t tokens = 0;
            std::vector<std::int64_t> units;
            for (auto i = static_cast<std::size_t>(plan.batch_offsets[b]);
                 i < static_cast<std::size_t>(plan.batch_offsets[b + 1]); ++i) {
                ++got[{plan.roles[i], plan.sequences[i]}];
                tokens += lengths[static_cast<std::size_t>(plan.roles[i])][static_cast<std::size_t>(plan.sequences[i])];
                if (plan.roles[i] != 2) {
                    units.push_back(plan.sequences[i]);
                }
                const int before = i == static_cast<std::size_t>(plan.batch_offsets[b]) ? -1 : plan.roles[i - 1];
                const bool alternate = alternates && before == 0;
                expect(alternate == (plan.roles[i] == 2), "an alternate does not follow a forget sequence");
                expect(!alternate || plan.sequences[i - 1] == plan.sequences[i], "an alternate of another sequence");
                expect(before != 1 || plan.roles[i] == 1, "a retain sequence before a forget sequence");
            }
            expect(!alternates || plan.batch_offsets[b] == plan.batch_offsets[b + 1] ||
                       plan.roles[static_cast<std::size_t>(plan.batch_offsets[b + 1]) - 1] != 0,
                   "a forget sequence without its alternate");
            expect(tokens == plan.batch_tokens[b], "batch_tokens");
            expect(tokens <= settings.token_budget || units.size() == 1, "a micro-batch exceeds the budget");
            ranks[(b - first) % ranks.size()] += tokens;
        }
        expect(got == want, "a step's micro-batches are not its pairs");
        const auto [low, high] = std::ranges::minmax(ranks);
        expect(high - low <= longest, "ranks differ by more than the longest sequence");
    }
}

void compare_plans(Bytes& bytes) {
    std::array<std::vector<std::int64_t>, 3> lengths;
    for (auto& own : lengths) {
        own.resize(static_cast<std::size_t>(bytes.below(20)));
        std::ranges::generate(own, [&] { return bytes.below(50) == 0 ? hostile(bytes) : 1 + bytes.below(40); });
    }
    if (bytes.below(2) == 0) {
        lengths[2].clear();
    } else if (bytes.below(8) != 0) {
        lengths[2].resize(lengths[0].size(), 5);
    }
    efface::EpochSettings settings{.pairs_per_step = 1 + bytes.below(12),
                                   .token_budget = 1 + bytes.below(120),
                                   .world_size = 1,
                                   .seed = bytes.next(),
                                   .epoch = bytes.next(),
                                   .retain_sampling = static_cast<efface::RetainSampling>(bytes.below(3)),
                                   .drop_last = bytes.below(2) == 0};
    std::optional<efface::EpochPlan> alone;
    try {
        alone = efface::plan_epoch(lengths[0], lengths[1], lengths[2], settings);
    } catch (const std::invalid_argument&) {
        return;
    }
    check_plan(*alone, lengths, settings);
    settings.world_size = 1 + bytes.below(9);
    settings.token_budget = 1 + bytes.below(120);
    const efface::EpochPlan spread = efface::plan_epoch(lengths[0], lengths[1], lengths[2], settings);
    check_plan(spread, lengths, settings);
    expect(spread.forget == alone->forget && spread.retain == alone->retain, "ranks or budget changed the pairs");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Bytes bytes(data, size);
    if (bytes.below(2) == 0) {
        compare_packers(bytes);
    } else {
        compare_plans(bytes);
    }
    return 0;
}
