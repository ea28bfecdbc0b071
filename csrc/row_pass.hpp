// The CPU row passes: one look at a chunk of logits.
//
// With z the logits of a row, optionally soft-capped (z ← cap · tanh(z / cap)), and y its target:
//   row pass            ℓ = z_y − logsumexp(z);                     logits ← softmax(z) − onehot(y)
//   distribution pass   q = softmax(zr − shift · onehot(y));        into   ← softmax(z) − q
// both times multiplied by the derivative of the soft-cap, so that what is written is the derivative of −ℓ, or of the
// cross entropy to q, with respect to the logits as they were.
//
// Arithmetic is fp32 for half-precision and fp32 logits, fp64 for fp64. Everything is relative to the row's maximum: ℓ
// ≈ 0 of a memorised target would drown in the rounding of z_y − logsumexp(z). The target entry is formed by expm1
// before it is rounded. A row is the work of one thread and is added up in a fixed order, so the number of threads
// changes no bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace efface {

enum class Element { bf16, fp16, fp32, fp64 };

// Rows of logits in the caller's memory: row i is the `vocabulary` elements from data + i · stride elements.
struct Logits {
    void* data = nullptr;
    Element element = Element::fp32;
    std::int64_t rows = 0;
    std::int64_t vocabulary = 0;
    std::int64_t stride = 0;
    double softcap = 0;  // 0: none
    // What the elements' rounding took away, to be added before the cap: as many elements, as far apart; or null. Not
    // for the row pass.
    const void* residual = nullptr;
};

// Rows that take a derivative: row i is the elements from data + i · stride elements, as many as the logits have.
struct Destination {
    void* data = nullptr;  // null: no derivative is wanted
    Element element = Element::fp32;
    std::int64_t stride = 0;
};

// Implementations of the vector arithmetic. `best` is the fastest that this machine runs.
enum class Backend { best, portable, avx2, avx512, neon };

struct Execution {
    int threads = 1;
    Backend backend = Backend::best;
};

// Writes ℓ of every row, and of the reference's rows (m ≤ n; its targets are the first m) if there are any. Outputs are
// float for all elements but fp64, whose outputs are double: `logprobs` points to n of them, `reference_logprobs` to m.
// Throws std::invalid_argument for shapes that do not fit, a target out of a vocabulary, or a backend this machine
// lacks.
void row_pass(const Logits& logits, std::span<const std::int64_t> targets, bool gradient, void* logprobs,
              const Logits& reference, void* reference_logprobs, const Execution& execution);

// Writes Σ q log(q / p) and the entropy −Σ q log q of every row, and softmax − q `into` rows of any element: the
// logits' own memory, memory that neither model has, or the reference's, where each row begins where the reference's
// does and no element is wider than its. `shift` lowers the reference logit of the target (UNDIAL's β; KL has 0).
// Elements of the two may differ, their vocabularies may not.
void distribution_pass(const Logits& logits, const Logits& reference, std::span<const std::int64_t> targets,
                       double shift, const Destination& into, void* divergence, void* entropy,
                       const Execution& execution);

// The backend that `best` stands for, and whether this machine runs a given one.
Backend best_backend();
bool supported(Backend backend);

// exp of `values` in place, as the passes compute it; for tests of its accuracy.
void exp_in_place(std::span<float> values, Backend backend);
void tanh_in_place(std::span<float> values, Backend backend);

}  // namespace efface
