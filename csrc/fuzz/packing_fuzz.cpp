// Differential fuzzing of the packer and of common prefixes against naive versions, and of the planner against its
// invariants, with invalid stores.
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

#include "common_prefix.hpp"
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

// What an input's sequences look like. Each equals one sequence that all have in common up to some position, or but for
// one token. With an alphabet of one or two tokens they share further tokens, repeat and contain one another. Common
// beginnings are compared in blocks of 16 tokens, so some sequences are longer.
struct Shape {
    std::int64_t alphabet;
    std::int64_t lengths;  // upper bound
};

Shape shape_of(Bytes& bytes) {
    constexpr std::array alphabets{1, 2, 2, 3, 256};
    return {alphabets[static_cast<std::size_t>(bytes.below(alphabets.size()))], bytes.below(4) == 0 ? 70 : 12};
}

std::vector<std::int32_t> sequence_of(Bytes& bytes, const Shape& shape) {
    const std::int64_t length = bytes.below(shape.lengths);
    const std::int64_t common = bytes.below(length + 1);
    const bool one_differs = bytes.below(2) == 0;
    std::vector<std::int32_t> ids;
    for (std::int64_t i = 0; i < length; ++i) {
        const bool same = i < common || (one_differs && i > common);
        ids.push_back(static_cast<std::int32_t>((same ? i : bytes.next()) % shape.alphabet));
    }
    return ids;
}

Chunk chunk_of(Bytes& bytes, const Shape& shape) {
    Chunk chunk;
    chunk.ids.resize(static_cast<std::size_t>(bytes.below(3)));
    chunk.offsets.push_back(static_cast<std::int64_t>(chunk.ids.size()));
    for (std::int64_t left = bytes.below(5); left > 0; --left) {
        const std::vector<std::int32_t> ids = sequence_of(bytes, shape);
        chunk.ids.insert(chunk.ids.end(), ids.begin(), ids.end());
        chunk.offsets.push_back(static_cast<std::int64_t>(chunk.ids.size()));
        chunk.label_starts.push_back(bytes.below(static_cast<std::int64_t>(ids.size()) + 2));
    }
    chunk.ids.shrink_to_fit();
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

using Stores = std::vector<std::vector<Chunk>>;

// Returns the tokens of a sequence and its label start, or nothing if there is no such sequence or it is invalid.
std::optional<std::pair<std::vector<std::int32_t>, std::int64_t>> naive_find(const std::vector<Chunk>& store,
                                                                             std::int64_t index) {
    if (index < 0) {
        return {};
    }
    for (const Chunk& chunk : store) {
        const auto count = static_cast<std::int64_t>(chunk.label_starts.size());
        if (index >= count) {
            index -= count;
            continue;
        }
        const auto i = static_cast<std::size_t>(index);
        const std::int64_t begin = chunk.offsets[i];
        const std::int64_t end = chunk.offsets[i + 1];
        if (begin < 0 || end < begin || end > static_cast<std::int64_t>(chunk.ids.size())) {
            return {};
        }
        return {{{chunk.ids.begin() + begin, chunk.ids.begin() + end}, chunk.label_starts[i]}};
    }
    return {};
}

bool same_beginning(const std::vector<std::int32_t>& one, const std::vector<std::int32_t>& other, std::size_t length) {
    return one.size() >= length && other.size() >= length &&
           std::equal(one.begin(), one.begin() + length, other.begin());
}

struct Batch {
    std::vector<std::int64_t> input_ids, position_ids, label_rows, targets, lengths, segment_lengths, row_offsets{0};
    std::vector<std::int32_t> cu_seqlens{0}, paths, cu_paths{0};
};

// A naive packer, token by token. A token is shared if any earlier sequence has it after the same tokens; the first
// such sequence stores it. Returns nothing if the input must be refused.
std::optional<Batch> naive(const Stores& stores, const std::vector<std::int8_t>& roles,
                           const std::vector<std::int64_t>& sequences, const efface::PackSettings& settings) {
    Batch out;
    std::vector<std::vector<std::int32_t>> runs, paths;  // of the earlier sequences
    for (std::size_t s = 0; s < roles.size(); ++s) {
        if (roles[s] < 0 || roles[s] >= static_cast<int>(stores.size())) {
            return {};
        }
        const auto found = naive_find(stores[static_cast<std::size_t>(roles[s])], sequences[s]);
        if (!found || found->second < 0) {
            return {};
        }
        const auto& [ids, start] = *found;
        std::vector<std::int32_t> run = ids;
        if (!settings.last_tokens && !run.empty()) {
            run.pop_back();
        }
        std::vector<std::int32_t> path;
        for (std::size_t position = 0; position < run.size(); ++position) {
            std::size_t earlier = 0;
            while (earlier < runs.size() && !same_beginning(runs[earlier], run, position + 1)) {
                ++earlier;
            }
            if (settings.share && earlier < runs.size() && position + 1 < run.size()) {
                path.push_back(paths[earlier][position]);
                continue;
            }
            // The last token is always stored, so that each sequence has a token of its own.
            path.push_back(static_cast<std::int32_t>(out.input_ids.size()));
            out.input_ids.push_back(run[position]);
            out.position_ids.push_back(static_cast<std::int64_t>(position));
        }
        bool labelled = false;
        for (std::size_t position = 1; position < ids.size(); ++position) {
            if (static_cast<std::int64_t>(position) >= start) {
                out.label_rows.push_back(path[position - 1]);
                out.targets.push_back(ids[position]);
                labelled = true;
            }
        }
        if (!labelled) {
            return {};
        }
        out.paths.insert(out.paths.end(), path.begin(), path.end());
        out.cu_paths.push_back(static_cast<std::int32_t>(out.paths.size()));
        out.lengths.push_back(static_cast<std::int64_t>(ids.size()));
        out.segment_lengths.push_back(static_cast<std::int64_t>(out.input_ids.size()) - out.cu_seqlens.back());
        out.cu_seqlens.push_back(static_cast<std::int32_t>(out.input_ids.size()));
        out.row_offsets.push_back(static_cast<std::int64_t>(out.targets.size()));
        runs.push_back(std::move(run));
        paths.push_back(std::move(path));
    }
    if (out.paths.size() == out.input_ids.size()) {  // nothing is shared
        out.paths.clear();
        out.cu_paths.clear();
    }
    return out;
}

// Stores that refer to the chunks.
std::vector<efface::TokenStore> lend(const Stores& chunks) {
    std::vector<efface::TokenStore> stores;
    for (const auto& own : chunks) {
        std::vector<efface::TokenChunk> lent;
        for (const Chunk& chunk : own) {
            lent.push_back({chunk.ids, chunk.offsets, chunk.label_starts});
        }
        stores.emplace_back("store", std::move(lent));
    }
    return stores;
}

Stores chunks_of(Bytes& bytes, const Shape& shape, std::int64_t count) {
    Stores chunks(static_cast<std::size_t>(count));
    for (auto& own : chunks) {
        own.resize(static_cast<std::size_t>(bytes.below(4)));
        std::ranges::generate(own, [&] { return chunk_of(bytes, shape); });
    }
    return chunks;
}

void compare_packers(Bytes& bytes) {
    const efface::PackSettings settings{.share = bytes.below(4) != 0, .last_tokens = bytes.below(2) == 0};
    const Stores chunks = chunks_of(bytes, shape_of(bytes), 1 + bytes.below(3));
    const std::vector<efface::TokenStore> stores = lend(chunks);
    std::vector<const efface::TokenStore*> lent;
    for (const auto& store : stores) {
        lent.push_back(&store);
    }
    std::vector<std::int8_t> roles;
    std::vector<std::int64_t> sequences;
    for (std::int64_t left = bytes.below(16); left > 0; --left) {
        const std::int64_t role = bytes.below(static_cast<std::int64_t>(stores.size()));
        const std::int64_t size = stores[static_cast<std::size_t>(role)].size();
        roles.push_back(static_cast<std::int8_t>(bytes.below(60) == 0 ? bytes.below(9) - 4 : role));
        sequences.push_back(bytes.below(60) == 0 || size == 0 ? hostile(bytes) : bytes.below(size));
    }
    const std::optional<Batch> expected = naive(chunks, roles, sequences, settings);

    const efface::Choice choice{roles, sequences};
    std::optional<efface::PackSize> size;
    try {
        size = efface::measure(lent, choice, settings);
    } catch (const std::invalid_argument&) {  // the naive packer must refuse the input too, see below
    }
    expect(size.has_value() == expected.has_value(), "measure and the naive packer disagree on refusing the input");
    if (!size) {
        return;
    }
    std::vector<std::int64_t> storage(static_cast<std::size_t>(efface::storage_words(*size)), -77);
    const efface::PackedLengths packed = efface::pack(lent, choice, storage, settings);
    const efface::PackedParts got = efface::parts_of(storage, *size);
    expect(std::ranges::equal(got.input_ids, expected->input_ids), "input_ids");
    expect(std::ranges::equal(got.position_ids, expected->position_ids), "position_ids");
    expect(std::ranges::equal(got.cu_seqlens, expected->cu_seqlens), "cu_seqlens");
    expect(std::ranges::equal(got.label_rows, expected->label_rows), "label_rows");
    expect(std::ranges::equal(got.targets, expected->targets), "targets");
    expect(std::ranges::equal(got.roles, roles), "roles");
    expect(std::ranges::equal(got.sequences, sequences), "sequences");
    expect(std::ranges::equal(got.paths, expected->paths), "paths");
    expect(std::ranges::equal(got.cu_paths, expected->cu_paths), "cu_paths");
    expect(packed.row_offsets == expected->row_offsets, "row_offsets");
    expect(packed.lengths == expected->lengths, "lengths");
    expect(packed.segment_lengths == expected->segment_lengths, "segment_lengths");
}

// Returns what `lengths` returns, or nothing if it refuses the stores.
template <typename Lengths>
std::optional<std::vector<std::int64_t>> accepted(const Lengths& lengths) {
    try {
        return lengths();
    } catch (const std::invalid_argument&) {
        return {};
    }
}

// Compares the common prefixes of two stores, and those of one store with a sequence.
void compare_prefixes(Bytes& bytes) {
    const Shape shape = shape_of(bytes);
    const Stores chunks = chunks_of(bytes, shape, 2);
    const std::vector<efface::TokenStore> stores = lend(chunks);
    const std::vector<std::int32_t> prefix = sequence_of(bytes, shape);

    std::optional<std::vector<std::int64_t>> with_prefix{std::in_place}, pairs{std::in_place};
    for (std::int64_t i = 0; i < stores[0].size(); ++i) {
        const auto one = naive_find(chunks[0], i);
        const auto other = naive_find(chunks[1], i);
        const auto add = [&](std::optional<std::vector<std::int64_t>>& lengths, const std::vector<std::int32_t>* with) {
            if (!one || with == nullptr) {
                lengths.reset();
            } else if (lengths) {
                std::size_t common = 0;
                while (same_beginning(one->first, *with, common + 1)) {
                    ++common;
                }
                lengths->push_back(static_cast<std::int64_t>(common));
            }
        };
        add(with_prefix, &prefix);
        add(pairs, other ? &other->first : nullptr);
    }
    if (stores[0].size() != stores[1].size()) {
        pairs.reset();
    }
    expect(accepted([&] { return efface::prefix_lengths(stores[0], prefix); }) == with_prefix, "prefix_lengths");
    expect(accepted([&] { return efface::pair_prefix_lengths(stores[0], stores[1]); }) == pairs, "pair_prefix_lengths");
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
    std::int64_t over_budget = 0;
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
            const std::int64_t run = units.empty() ? 0 : tokens + settings.shared_tokens;
            expect(run == plan.batch_tokens[b], "batch_tokens");
            expect(run <= settings.token_budget || units.size() == 1, "a micro-batch exceeds the budget");
            over_budget += run > settings.token_budget ? 1 : 0;  // with one unit
            ranks[(b - first) % ranks.size()] += tokens;
        }
        expect(got == want, "a step's micro-batches are not its pairs");
        const auto [low, high] = std::ranges::minmax(ranks);
        expect(high - low <= longest, "ranks differ by more than the longest sequence");
    }
    expect(over_budget == plan.over_budget, "over_budget");
}

// In half of the inputs nothing; otherwise up to more than any budget.
std::int64_t shared_tokens_of(Bytes& bytes) { return bytes.below(2) == 0 ? 0 : bytes.below(140); }

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
                                   .shared_tokens = shared_tokens_of(bytes),
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
    settings.shared_tokens = shared_tokens_of(bytes);
    const efface::EpochPlan spread = efface::plan_epoch(lengths[0], lengths[1], lengths[2], settings);
    check_plan(spread, lengths, settings);
    expect(spread.forget == alone->forget && spread.retain == alone->retain, "ranks or budget changed the pairs");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Bytes bytes(data, size);
    switch (bytes.below(8)) {
        case 0:
        case 1:
        case 2:
        case 3:
            compare_packers(bytes);
            break;
        case 4:
            compare_prefixes(bytes);
            break;
        default:
            compare_plans(bytes);
    }
    return 0;
}
