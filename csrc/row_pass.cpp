#include "row_pass.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "parallel.hpp"
#include "refuse.hpp"
#include "row_kernels.hpp"

namespace efface {
namespace {

using kernels::Row;
using kernels::RowPair;
using kernels::Table;

std::size_t size_of(Element element) {
    switch (element) {
        case Element::fp64:
            return 8;
        case Element::fp32:
            return 4;
        default:
            return 2;
    }
}

std::size_t index(Element element) { return static_cast<std::size_t>(element); }

const Table* compiled(Backend backend) {
    switch (backend) {
        case Backend::avx512:
            return kernels::avx512_table;
        case Backend::avx2:
            return kernels::avx2_table;
        case Backend::neon:
            return kernels::neon_table;
        default:
            return kernels::portable_table;
    }
}

const Table& table_of(Backend backend) {
    if (backend == Backend::best) {
        static const Table* const best = compiled(best_backend());
        return *best;
    }
    if (!supported(backend)) {
        refuse("`backend`: expected one that this machine and this build support, got another one; use `best`");
    }
    return *compiled(backend);
}

void check(const Logits& logits, std::span<const std::int64_t> targets, const char* name) {
    const std::string called = quoted(name);
    if (logits.rows < 0 || logits.vocabulary < 1 || logits.stride < 0) {
        refuse(called + ": expected rows >= 0, vocabulary >= 1, stride >= 0, got " + std::to_string(logits.rows) +
               ", " + std::to_string(logits.vocabulary) + ", " + std::to_string(logits.stride));
    }
    if (logits.rows > 0 && logits.data == nullptr) {
        refuse(called + ": expected an address, got null");
    }
    if (logits.rows > static_cast<std::int64_t>(targets.size())) {
        refuse("`targets`: expected " + std::to_string(logits.rows) + " entries, one for each row of " + called +
               ", got " + std::to_string(targets.size()));
    }
    for (std::int64_t i = 0; i < logits.rows; ++i) {
        const std::int64_t target = targets[static_cast<std::size_t>(i)];
        if (target < 0 || target >= logits.vocabulary) {
            refuse("`targets`: expected token ids in 0 .. " + std::to_string(logits.vocabulary - 1) +
                   " (the columns of " + called + "), got " + std::to_string(target) + " in row " + std::to_string(i));
        }
    }
    if (!(logits.softcap >= 0)) {
        refuse(called + " softcap: expected 0 (none) or a positive number, got " + std::to_string(logits.softcap));
    }
}

// Returns the address of a row of logits, residuals or a destination; null if `data` is null.
template <typename Pointer>
Pointer row_of(Pointer data, const auto& rows, std::int64_t row) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    return data == nullptr
               ? nullptr
               : static_cast<Byte*>(data) + static_cast<std::size_t>(row * rows.stride) * size_of(rows.element);
}

// Returns the bytes from a row to the row that the same thread will probably process next, or 0 if there is none.
std::int64_t bytes_ahead(const Logits& logits, std::int64_t row, int threads) {
    const std::int64_t rows = std::max(threads, 1);
    return row + rows < logits.rows ? rows * logits.stride * static_cast<std::int64_t>(size_of(logits.element)) : 0;
}

void write(void* to, Element element, std::int64_t row, double value) {
    if (element == Element::fp64) {
        static_cast<double*>(to)[row] = value;
    } else {
        static_cast<float*>(to)[row] = static_cast<float>(value);
    }
}

// Calls work(row, scratch) for every row, on up to `threads` threads with separate scratch memory. Threads take rows
// one by one, so a slow or busy core processes fewer rows. The result of a row does not depend on its thread.
template <typename Work>
void for_each_row(std::int64_t rows, int threads, std::size_t scratch_floats, Work work) {
    const int workers = static_cast<int>(std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(rows, 1)));
    std::vector<std::unique_ptr<float[]>> scratch(static_cast<std::size_t>(workers));
    for (auto& buffer : scratch) {
        buffer.reset(new float[scratch_floats]);  // not initialised
    }
    std::atomic<std::int64_t> next{0};
    run_in_parallel(workers, [&](std::size_t worker) {
        for (std::int64_t row = next.fetch_add(1); row < rows; row = next.fetch_add(1)) {
            work(row, scratch[worker].get());
        }
    });
}

}  // namespace

bool supported(Backend backend) {
    if (compiled(backend) == nullptr) {
        return false;
    }
#if defined(__x86_64__) && defined(__GNUC__)
    if (backend == Backend::avx512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    if (backend == Backend::avx2) {
        // __builtin_cpu_supports has no name for F16C, but every processor with AVX2 and FMA has it
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
#endif
    return true;
}

Backend best_backend() {
    constexpr std::array order{Backend::avx512, Backend::avx2, Backend::neon};
    const auto* const found = std::ranges::find_if(order, supported);
    return found == order.end() ? Backend::portable : *found;
}

void row_pass(const Logits& logits, std::span<const std::int64_t> targets, bool gradient, void* logprobs,
              const Logits& reference, void* reference_logprobs, const Execution& execution) {
    check(logits, targets, "logits");
    if (static_cast<std::int64_t>(targets.size()) != logits.rows) {
        refuse("`targets`: expected " + std::to_string(logits.rows) + " entries, got " +
               std::to_string(targets.size()));
    }
    if (reference.rows > 0) {
        check(reference, targets, "reference_logits");
    }
    if (logits.residual != nullptr || reference.residual != nullptr) {
        refuse("`logits`, `reference_logits`: expected no residual in the row pass, got one");
    }
    const Table& table = table_of(execution.backend);
    const std::int64_t widest = std::max(logits.vocabulary, reference.rows > 0 ? reference.vocabulary : 0);
    for_each_row(logits.rows, execution.threads, static_cast<std::size_t>(widest), [&](std::int64_t i, float* scratch) {
        const auto run = [&](const Logits& model, bool overwrite, void* out) {
            const Row row{.logits = row_of(model.data, model, i),
                          .vocabulary = model.vocabulary,
                          .target = targets[static_cast<std::size_t>(i)],
                          .softcap = model.softcap,
                          .gradient = overwrite,
                          .scratch = scratch,
                          .ahead = bytes_ahead(model, i, execution.threads)};
            write(out, model.element, i, table.logprob[index(model.element)](row));
        };
        if (i < reference.rows) {
            run(reference, false, reference_logprobs);
        }
        run(logits, gradient, logprobs);
    });
}

void distribution_pass(const Logits& logits, const Logits& reference, std::span<const std::int64_t> targets,
                       double shift, const Destination& into, void* divergence, void* entropy,
                       const Execution& execution) {
    check(logits, targets, "logits");
    check(reference, targets, "reference_logits");
    if (logits.rows != reference.rows || logits.vocabulary != reference.vocabulary ||
        static_cast<std::int64_t>(targets.size()) != logits.rows) {
        refuse("`reference_logits`: expected " + std::to_string(logits.rows) + " x " +
               std::to_string(logits.vocabulary) + ", the shape of `logits`, and one target per row; got " +
               std::to_string(reference.rows) + " x " + std::to_string(reference.vocabulary) + " and " +
               std::to_string(targets.size()));
    }
    if (into.stride < 0) {
        refuse("`into`: expected stride >= 0, got " + std::to_string(into.stride));
    }
    if (into.element == Element::fp64 && logits.element != Element::fp64) {
        refuse("`into`: expected a dtype other than fp64 unless `logits` are fp64, got fp64");
    }
    const auto kernel = table_of(execution.backend).divergence[index(logits.element)][index(reference.element)];
    if (kernel == nullptr) {
        refuse("`reference_logits`: expected a dtype other than fp64 unless `logits` are fp64, got fp64");
    }
    const auto width = static_cast<std::size_t>(logits.vocabulary);
    for_each_row(logits.rows, execution.threads, 2 * width, [&](std::int64_t i, float* scratch) {
        const RowPair row{.logits = row_of(logits.data, logits, i),
                          .residual = row_of(logits.residual, logits, i),
                          .reference = row_of(reference.data, reference, i),
                          .reference_residual = row_of(reference.residual, reference, i),
                          .vocabulary = logits.vocabulary,
                          .target = targets[static_cast<std::size_t>(i)],
                          .softcap = logits.softcap,
                          .reference_softcap = reference.softcap,
                          .shift = shift,
                          .into = row_of(into.data, into, i),
                          .into_element = into.element,
                          .scratch = scratch,
                          .reference_scratch = scratch + width};
        double row_divergence = 0;
        double row_entropy = 0;
        kernel(row, &row_divergence, &row_entropy);
        write(divergence, logits.element, i, row_divergence);
        write(entropy, logits.element, i, row_entropy);
    });
}

void exp_in_place(std::span<float> values, Backend backend) {
    table_of(backend).exp(values.data(), static_cast<std::int64_t>(values.size()));
}

void tanh_in_place(std::span<float> values, Backend backend) {
    table_of(backend).tanh(values.data(), static_cast<std::int64_t>(values.size()));
}

}  // namespace efface
