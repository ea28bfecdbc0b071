// Differential fuzzing of the row passes against naive ones.
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

// The ten lines that the passes are compared with.
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

    // Exactly as large as the pass may touch: what it reads or writes beyond, the sanitizer sees.
    const auto size = static_cast<std::size_t>(rows == 0 ? 0 : (rows - 1) * stride + vocabulary);
    std::vector<float> z(size);
    std::vector<float> zr(size);
    std::generate(z.begin(), z.end(), [&] { return static_cast<float>(bytes.logit()); });
    std::generate(zr.begin(), zr.end(), [&] { return static_cast<float>(bytes.logit()); });
    std::vector<std::int64_t> targets(static_cast<std::size_t>(rows));
    std::generate(targets.begin(), targets.end(), [&] { return bytes.below(vocabulary); });

    std::vector<float> p = z;
    std::vector<float> difference = z;
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
    efface::row_pass(logits(p), targets, true, logprobs.data(), logits(zr), reference_logprobs.data(), execution);
    efface::distribution_pass(logits(difference), logits(zr), targets, shift, true, divergence.data(), entropy.data(),
                              execution);

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
        reference[target] -= shift;
        const std::vector<double> log_p = log_softmax(policy);
        const std::vector<double> log_q = log_softmax(reference);
        expect_near(logprobs[i], log_p[target], "log-probability");
        double kl = 0;
        double h = 0;
        for (std::size_t v = 0; v < policy.size(); ++v) {
            const std::size_t at = i * static_cast<std::size_t>(stride) + v;
            const double t = softcap == 0 ? 0 : std::tanh(static_cast<double>(z[at]) / softcap);
            const double slope = (1 - t) * (1 + t);
            expect_near(p[at], (std::exp(log_p[v]) - (v == target ? 1 : 0)) * slope, "softmax - onehot");
            expect_near(difference[at], (std::exp(log_p[v]) - std::exp(log_q[v])) * slope, "p - q");
            kl += std::exp(log_q[v]) * (log_q[v] - log_p[v]);
            h -= std::exp(log_q[v]) * log_q[v];
        }
        expect_near(divergence[i], kl, "divergence");
        expect_near(entropy[i], h, "entropy");
        // what lies between the rows is nobody's
        for (std::int64_t v = vocabulary; v < stride && row + 1 < rows; ++v) {
            const auto at = static_cast<std::size_t>(row * stride + v);
            if (std::memcmp(&p[at], &z[at], sizeof(float)) != 0) {
                std::fprintf(stderr, "the gap after row %zu was written\n", i);
                std::abort();
            }
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    compare({data, size});
    return 0;
}
