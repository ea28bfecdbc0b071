// Differential fuzzing of the passes over logits against naive implementations.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fuzz.hpp"
#include "row_pass.hpp"

namespace {

using fuzz::Bytes;

double cap(double z, double softcap) { return softcap == 0 ? z : softcap * std::tanh(z / softcap); }

// The naive implementation that the passes are compared with.
std::vector<double> log_softmax(std::vector<double> z) {
    const double top = *std::max_element(z.begin(), z.end());
    double total = 0;
    for (const double x : z) {
        total += std::exp(x - top);
    }
    for (double& x : z) {
        x -= top + std::log(total);
    }
    return z;
}

void expect_near(double got, double want, const char* what) {
    if (!(std::abs(got - want) <= 2e-5 * (1 + std::abs(want)))) {
        std::fprintf(stderr, "%s: got %.9g, want %.9g\n", what, got, want);
        std::abort();
    }
}

void compare(Bytes bytes) {
    constexpr efface::Backend backends[] = {efface::Backend::portable, efface::Backend::avx2, efface::Backend::avx512,
                                            efface::Backend::neon};
    const efface::Backend backend = backends[bytes.below(4)];
    if (!efface::supported(backend)) {
        return;
    }
    const std::int64_t rows = bytes.below(5);
    const std::int64_t vocabulary = 1 + bytes.below(70);
    const std::int64_t stride = vocabulary + bytes.below(3);
    const double softcap = bytes.below(2) == 0 ? 0 : 1 + bytes.next() / 8.0;
    const double shift = bytes.next() / 16.0;
    const efface::Execution execution{.threads = static_cast<int>(1 + bytes.below(3)), .backend = backend};

    // Exact sizes, so that the sanitizer detects reads and writes beyond the matrices.
    const auto size = static_cast<std::size_t>(rows == 0 ? 0 : (rows - 1) * stride + vocabulary);
    std::vector<float> z(size);
    std::vector<float> zr(size);
    std::generate(z.begin(), z.end(), [&] { return static_cast<float>(bytes.logit()); });
    std::generate(zr.begin(), zr.end(), [&] { return static_cast<float>(bytes.logit()); });
    // Residuals of both models' logits; not used in half of the inputs.
    std::vector<float> residual(size);
    std::vector<float> reference_residual(size);
    const bool with_residuals = bytes.below(2) == 0;
    if (with_residuals) {
        std::generate(residual.begin(), residual.end(), [&] { return static_cast<float>(bytes.logit() / 64); });
        std::generate(reference_residual.begin(), reference_residual.end(),
                      [&] { return static_cast<float>(bytes.logit() / 64); });
    }
    std::vector<std::int64_t> targets(static_cast<std::size_t>(rows));
    std::generate(targets.begin(), targets.end(), [&] { return bytes.below(vocabulary); });

    std::vector<float> p = z;
    // Destination of p − q: the logits, separate memory, or none. Or the reference's logits in bf16, where each row
    // begins where the reference's row begins.
    enum class Place { in_place, over_reference, elsewhere, nowhere };
    const auto place = static_cast<Place>(bytes.below(4));
    std::vector<float> policy_logits = z;
    std::vector<float> reference_logits = zr;
    std::vector<float> elsewhere(size);
    std::vector<float> logprobs(targets.size());
    std::vector<float> reference_logprobs(targets.size());
    std::vector<float> divergence(targets.size());
    std::vector<float> entropy(targets.size());
    const auto logits = [&](std::vector<float>& values) {
        return efface::Logits{.data = values.data(),
                              .element = efface::Element::fp32,
                              .rows = rows,
                              .vocabulary = vocabulary,
                              .stride = stride,
                              .softcap = softcap};
    };
    const auto whole = [&](std::vector<float>& values, const std::vector<float>& rest) {
        efface::Logits both = logits(values);
        both.residual = with_residuals ? rest.data() : nullptr;
        return both;
    };
    efface::Destination into{.data = policy_logits.data(), .element = efface::Element::fp32, .stride = stride};
    if (place == Place::over_reference) {
        into = {.data = reference_logits.data(), .element = efface::Element::bf16, .stride = 2 * stride};
    } else if (place == Place::elsewhere) {
        into.data = elsewhere.data();
    } else if (place == Place::nowhere) {
        into = {};
    }
    const auto difference = [&](std::int64_t row, std::int64_t v) {
        const auto at = static_cast<std::size_t>(row * into.stride + v);
        if (into.element == efface::Element::fp32) {
            return static_cast<double>(static_cast<const float*>(into.data)[at]);
        }
        std::uint16_t half = 0;
        std::memcpy(&half, static_cast<const char*>(into.data) + 2 * at, sizeof(half));
        const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
        float value = 0;
        std::memcpy(&value, &bits, sizeof(value));
        return static_cast<double>(value);
    };
    efface::row_pass(logits(p), targets, true, logprobs.data(), logits(zr), reference_logprobs.data(), execution);
    efface::distribution_pass(whole(policy_logits, residual), whole(reference_logits, reference_residual), targets,
                              shift, into, divergence.data(), entropy.data(), execution);

    for (std::int64_t row = 0; row < rows; ++row) {
        const auto i = static_cast<std::size_t>(row);
        const auto target = static_cast<std::size_t>(targets[i]);
        std::vector<double> policy;
        std::vector<double> reference;
        for (std::int64_t v = 0; v < vocabulary; ++v) {
            const auto at = static_cast<std::size_t>(row * stride + v);
            policy.push_back(cap(z[at], softcap));
            reference.push_back(cap(zr[at], softcap));
        }
        expect_near(reference_logprobs[i], log_softmax(reference)[target], "reference log-probability");
        const std::vector<double> log_softmax_of_policy = log_softmax(policy);
        expect_near(logprobs[i], log_softmax_of_policy[target], "log-probability");
        const auto sum = [&](const std::vector<float>& values, const std::vector<float>& rest, std::int64_t v) {
            const auto at = static_cast<std::size_t>(row * stride + v);
            return static_cast<double>(values[at]) + static_cast<double>(rest[at]);
        };
        for (std::int64_t v = 0; v < vocabulary; ++v) {
            policy[static_cast<std::size_t>(v)] = cap(sum(z, residual, v), softcap);
            reference[static_cast<std::size_t>(v)] = cap(sum(zr, reference_residual, v), softcap);
        }
        reference[target] -= shift;
        const std::vector<double> log_p = log_softmax(policy);
        const std::vector<double> log_q = log_softmax(reference);
        double kl = 0;
        double h = 0;
        for (std::size_t v = 0; v < policy.size(); ++v) {
            const std::size_t at = i * static_cast<std::size_t>(stride) + v;
            const auto slope = [&](double uncapped) {
                const double t = softcap == 0 ? 0 : std::tanh(uncapped / softcap);
                return (1 - t) * (1 + t);
            };
            const double p_minus_onehot = std::exp(log_softmax_of_policy[v]) - (v == target ? 1 : 0);
            expect_near(p[at], p_minus_onehot * slope(z[at]), "softmax - onehot");
            if (place != Place::nowhere) {
                const auto column = static_cast<std::int64_t>(v);
                const double want = (std::exp(log_p[v]) - std::exp(log_q[v])) * slope(sum(z, residual, column));
                const double rounding = into.element == efface::Element::bf16 ? std::abs(want) / 256 : 0;
                const double got = difference(row, column);
                expect_near(std::abs(got - want) <= rounding ? want : got, want, "p - q");
            }
            kl += std::exp(log_q[v]) * (log_q[v] - log_p[v]);
            h -= std::exp(log_q[v]) * log_q[v];
        }
        expect_near(divergence[i], kl, "divergence");
        expect_near(entropy[i], h, "entropy");
        // the gaps between the rows must not be written
        for (std::int64_t v = vocabulary; v < stride && row + 1 < rows; ++v) {
            const auto at = static_cast<std::size_t>(row * stride + v);
            const bool kept = std::memcmp(&p[at], &z[at], sizeof(float)) == 0 &&
                              std::memcmp(&policy_logits[at], &z[at], sizeof(float)) == 0 &&
                              std::memcmp(&reference_logits[at], &zr[at], sizeof(float)) == 0;
            if (!kept) {
                std::fprintf(stderr, "the gap after row %zu was written\n", i);
                std::abort();
            }
        }
    }
    const auto same = [](const std::vector<float>& left, const std::vector<float>& right) {
        return left.empty() || std::memcmp(left.data(), right.data(), left.size() * sizeof(float)) == 0;
    };
    fuzz::expect(place == Place::in_place || same(policy_logits, z), "the policy's logits were written");
    fuzz::expect(place == Place::over_reference || same(reference_logits, zr), "the reference's logits were written");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    compare({data, size});
    return 0;
}
