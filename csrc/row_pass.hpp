// The passes over a chunk of logits on the CPU.
//
// With z the logits of a row, optionally soft-capped (z ← cap · tanh(z / cap)), and y its target:
//   row pass            ℓ = z_y − logsumexp(z);                     logits ← softmax(z) − onehot(y)
//   distribution pass   q = softmax(zr − shift · onehot(y));        into   ← softmax(z) − q
// Both results are multiplied by the derivative of the soft-cap. They are the derivatives of −ℓ, or of the cross
// entropy to q, with respect to the uncapped logits.
//
// Arithmetic is fp32 for half-precision and fp32 logits, and fp64 for fp64. All values are relative to the row's
// maximum, because ℓ ≈ 0 of a memorised target would be lost in the rounding error of z_y − logsumexp(z). The target's
// entry is computed with expm1 before it is rounded. Each row is processed by one thread and summed in a fixed order,
// so the result does not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace efface {

enum class Element { bf16, fp16, fp32, fp64 };

// Rows of logits in the caller's memory: row i consists of `vocabulary` elements, starting i · stride elements after
// data.
struct Logits {
    void* data = nullptr;
    Element element = Element::fp32;
    std::int64_t rows = 0;
    std::int64_t vocabulary = 0;
    std::int64_t stride = 0;
    double softcap = 0;  // 0: none
    // Rounding error of the elements, which is added before the cap, with the same shape and stride; or null. The row
    // pass does not support it.
    const void* residual = nullptr;
};

// Rows that receive a derivative: row i starts i · stride elements after data and is as long as a row of the logits.
struct Destination {
    void* data = nullptr;  // null: no derivative is computed
    Element element = Element::fp32;
    std::int64_t stride = 0;
};

// Implementations of the vector arithmetic. `best` is the fastest one that this machine supports.
enum class Backend { best, portable, avx2, avx512, neon };

struct Execution {
    int threads = 1;
    Backend backend = Backend::best;
};

// Writes ℓ of the n rows and of the m ≤ n rows of the reference, whose targets are the first m. `logprobs` points to n
// outputs and `reference_logprobs` to m. Outputs are double for fp64 elements and float for all others.
// Throws std::invalid_argument for shapes that do not match, a target outside a vocabulary, or a backend that this
// machine does not support.
void row_pass(const Logits& logits, std::span<const std::int64_t> targets, bool gradient, void* logprobs,
              const Logits& reference, void* reference_logprobs, const Execution& execution);

// Writes Σ q log(q / p) and the entropy −Σ q log q of every row, and softmax − q to `into`. `into` can be the memory of
// the logits, separate memory, or the memory of the reference if each row begins where the reference's row begins and
// the elements are not wider. `shift` lowers the reference logit of the target (UNDIAL's β; 0 for KL). The elements of
// the two models can differ, their vocabularies must be the same.
void distribution_pass(const Logits& logits, const Logits& reference, std::span<const std::int64_t> targets,
                       double shift, const Destination& into, void* divergence, void* entropy,
                       const Execution& execution);

// Returns the backend that `best` selects, and whether this machine supports a given backend.
Backend best_backend();
bool supported(Backend backend);

// Replace `values` by exp or tanh, as computed by the passes; for tests of their accuracy.
void exp_in_place(std::span<float> values, Backend backend);
void tanh_in_place(std::span<float> values, Backend backend);

}  // namespace efface
