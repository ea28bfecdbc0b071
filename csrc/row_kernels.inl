// The maths of the row passes, once, over a vector type `V` that the including file defines:
//
//   V::width, V::set(x), V::load(const T*), V::store(T*) for T in float, Bf16, Fp16;
//   + - * /, fma(a, b, c) = a b + c, max, abs, select(mask, a, b), a < b, round, times_power_of_two(x, n), sum(v),
//   largest(v)
//
// Everything is in an unnamed namespace, so that each backend's translation unit keeps its own copy: a function that
// the linker could share would let instructions of one machine run on another.
namespace {

using efface::kernels::Row;

// e^x for |x| up to the range of float; ≤ 1 ulp in [-87, 88], gradual underflow below (the polynomial of Cephes' expf).
inline V exp(V x) {
    // x = n ln 2 + r, |r| ≤ ln 2 / 2; ln 2 in two parts, so that n ln 2 is exact to the last bit of r
    const V n = round(x * V::set(1.44269504088896341F));
    V r = fma(n, V::set(-0.693359375F), x);
    r = fma(n, V::set(2.12194440e-4F), r);
    V p = V::set(1.9875691500e-4F);
    p = fma(p, r, V::set(1.3981999507e-3F));
    p = fma(p, r, V::set(8.3334519073e-3F));
    p = fma(p, r, V::set(4.1665795894e-2F));
    p = fma(p, r, V::set(1.6666665459e-1F));
    p = fma(p, r, V::set(5.0000001201e-1F));
    p = fma(p, r * r, r) + V::set(1.0F);
    V y = times_power_of_two(p, n);
    y = select(x < V::set(-104.0F), V::set(0.0F), y);
    // the comparison is false for NaN, which passes through
    return select(V::set(88.7228394F) < x, V::set(__builtin_inff()), y);
}

// tanh x, ≤ 2 ulp (Cephes' tanhf: a polynomial near 0, where 1 − 2 / (e^2x + 1) would cancel).
inline V tanh(V x) {
    const V a = abs(x);
    const V z = x * x;
    V p = V::set(-5.70498872745e-3F);
    p = fma(p, z, V::set(2.06390887954e-2F));
    p = fma(p, z, V::set(-5.37397155531e-2F));
    p = fma(p, z, V::set(1.33314422036e-1F));
    p = fma(p, z, V::set(-3.33332819422e-1F));
    const V near = fma(p * z, x, x);
    const V e = exp(a + a);
    const V far = V::set(1.0F) - V::set(2.0F) / (e + V::set(1.0F));
    return select(a < V::set(0.625F), near, select(x < V::set(0.0F), V::set(0.0F) - far, far));
}

// Calls body(i, n) for each vector of a row: n = V::width, and less for the last one.
template <typename Body>
inline void for_each_vector(std::int64_t count, Body body) {
    std::int64_t i = 0;
    for (; i + V::width <= count; i += V::width) {
        body(i, V::width);
    }
    if (i < count) {
        body(i, static_cast<int>(count - i));
    }
}

// Calls body(begin, end) for blocks of 64 vectors. Each block is added up in fp32 and the blocks in fp64: over 128256
// terms the rounding of one running fp32 sum would exceed that of everything else.
template <typename Body>
inline void for_each_block(std::int64_t count, Body body) {
    constexpr std::int64_t block = 64 * V::width;
    for (std::int64_t begin = 0; begin < count; begin += block) {
        body(begin, begin + block < count ? begin + block : count);
    }
}

// The last vector of a row goes through a buffer; lanes beyond the row hold `fill`.
template <typename T>
inline V load(const T* from, int n, float fill) {
    if (n == V::width) {
        return V::load(from);
    }
    float lanes[V::width];
    for (int i = 0; i < V::width; ++i) {
        lanes[i] = i < n ? widen(from[i]) : fill;
    }
    return V::load(lanes);
}

template <typename T>
inline void store(V v, T* to, int n) {
    if (n == V::width) {
        v.store(to);
        return;
    }
    T lanes[V::width];
    v.store(lanes);
    for (int i = 0; i < n; ++i) {
        to[i] = lanes[i];
    }
}

constexpr float lowest = -__builtin_inff();

// max() may drop a NaN; the sum of the exponentials does not, so it comes out of a row that holds one.
// Reads a row: scratch ← capped logits if there is a cap; returns their maximum.
template <typename T>
float row_maximum(const T* logits, std::int64_t vocabulary, float softcap, float* scratch) {
    V top = V::set(lowest);
    if (softcap == 0.0F) {
        for_each_vector(vocabulary, [&](std::int64_t i, int n) { top = max(top, load(logits + i, n, lowest)); });
    } else {
        const V cap = V::set(softcap);
        const V inverse = V::set(1.0F / softcap);
        for_each_vector(vocabulary, [&](std::int64_t i, int n) {
            const V z = cap * tanh(load(logits + i, n, lowest) * inverse);
            store(z, scratch + i, n);
            // tanh maps the fill to −cap, which the row may not reach
            top = max(top, n == V::width ? z : load(scratch + i, n, lowest));
        });
    }
    return largest(top);
}

// Returns Σ e^(z − top), and keeps the terms in `keep` unless that is null (it may be `from` itself).
template <typename T>
double row_exponentials(const T* from, std::int64_t vocabulary, float top, float* keep) {
    const V shift = V::set(top);
    double total = 0;
    for_each_block(vocabulary, [&](std::int64_t begin, std::int64_t end) {
        V part = V::set(0.0F);
        for_each_vector(end - begin, [&](std::int64_t i, int n) {
            // the fill of a last vector becomes e^(−∞) = 0, unless top is infinite and the row is NaN all the same
            const V e = exp(load(from + begin + i, n, lowest) - shift);
            if (keep != nullptr) {
                store(e, keep + begin + i, n);
            }
            part = part + e;
        });
        total += static_cast<double>(sum(part));
    });
    return total;
}

// (1 − (z / cap)²) from the uncapped logits.
template <typename T>
inline V cap_slope(const T* logits, int n, V inverse) {
    const V t = tanh(load(logits, n, 0.0F) * inverse);
    return (V::set(1.0F) - t) * (V::set(1.0F) + t);
}

template <typename T>
double row_logprob(const Row& row) {
    auto* logits = static_cast<T*>(row.logits);
    auto* scratch = static_cast<float*>(row.scratch);
    const auto softcap = static_cast<float>(row.softcap);
    const float top = row_maximum(logits, row.vocabulary, softcap, scratch);
    const float target = softcap == 0.0F ? widen(logits[row.target]) : scratch[row.target];
    const double total = softcap == 0.0F ? row_exponentials(logits, row.vocabulary, top, scratch)
                                         : row_exponentials(scratch, row.vocabulary, top, scratch);
    const double logprob = static_cast<double>(target - top) - __builtin_log(total);
    if (row.gradient) {
        const V scale = V::set(static_cast<float>(1 / total));
        const float entry = static_cast<float>(__builtin_expm1(logprob));
        if (softcap == 0.0F) {
            for_each_vector(row.vocabulary,
                            [&](std::int64_t i, int n) { store(load(scratch + i, n, 0.0F) * scale, logits + i, n); });
            logits[row.target] = narrow<T>(entry);
        } else {
            scratch[row.target] = static_cast<float>(static_cast<double>(entry) * total);
            const V inverse = V::set(1.0F / softcap);
            for_each_vector(row.vocabulary, [&](std::int64_t i, int n) {
                store(load(scratch + i, n, 0.0F) * scale * cap_slope(logits + i, n, inverse), logits + i, n);
            });
        }
    }
    return logprob;
}

template <typename T, typename R>
void row_divergence(const Row& row, double* divergence, double* entropy) {
    auto* logits = static_cast<T*>(row.logits);
    const auto* reference = static_cast<const R*>(row.reference);
    auto* p = static_cast<float*>(row.scratch);
    auto* q = static_cast<float*>(row.reference_scratch);
    const auto softcap = static_cast<float>(row.softcap);
    const auto reference_softcap = static_cast<float>(row.reference_softcap);
    const std::int64_t count = row.vocabulary;

    // The values z and zr stay in scratch until both are known: log(q / p) is a difference of logits, not of
    // logarithms.
    const auto values = [&](const auto* from, float cap, float* to) {
        if (cap != 0.0F) {
            row_maximum(from, count, cap, to);
        } else {
            for_each_vector(count, [&](std::int64_t i, int n) { store(load(from + i, n, 0.0F), to + i, n); });
        }
    };
    values(logits, softcap, p);
    values(reference, reference_softcap, q);
    q[row.target] -= static_cast<float>(row.shift);
    const float p_top = row_maximum(p, count, 0.0F, nullptr);
    const float q_top = row_maximum(q, count, 0.0F, nullptr);
    const V p_log = V::set(static_cast<float>(__builtin_log(row_exponentials(p, count, p_top, nullptr))));
    const V q_log = V::set(static_cast<float>(__builtin_log(row_exponentials(q, count, q_top, nullptr))));

    const V inverse = V::set(softcap == 0.0F ? 1.0F : 1.0F / softcap);
    const V zero = V::set(0.0F);
    *divergence = 0;
    *entropy = 0;
    for_each_block(count, [&](std::int64_t begin, std::int64_t end) {
        V kl = zero;
        V h = zero;
        for_each_vector(end - begin, [&](std::int64_t at, int n) {
            const std::int64_t i = begin + at;
            const V log_p = load(p + i, n, lowest) - V::set(p_top) - p_log;
            const V log_q = load(q + i, n, lowest) - V::set(q_top) - q_log;
            const V prob_p = exp(log_p);
            const V prob_q = exp(log_q);
            // q log q → 0 as q → 0: a class that q excludes adds nothing, whatever p says of it. NaN is not 0.
            const auto absent = !(zero < prob_q);
            const auto poisoned = !(prob_q < V::set(2.0F));
            kl = kl + select(absent, select(poisoned, prob_q, zero), prob_q * (log_q - log_p));
            h = h - select(absent, select(poisoned, prob_q, zero), prob_q * log_q);
            if (row.gradient) {
                V difference = prob_p - prob_q;
                if (softcap != 0.0F) {
                    difference = difference * cap_slope(logits + i, n, inverse);
                }
                store(difference, logits + i, n);
            }
        });
        *divergence += static_cast<double>(sum(kl));
        *entropy += static_cast<double>(sum(h));
    });
}

// fp64: the same formulas one element at a time; it serves exact comparisons, not speed.
inline double capped(double z, double cap) { return cap == 0 ? z : cap * __builtin_tanh(z / cap); }

inline double slope(double z, double cap) {
    const double t = cap == 0 ? 0 : __builtin_tanh(z / cap);
    return (1 - t) * (1 + t);
}

double row_logprob_fp64(const Row& row) {
    auto* z = static_cast<double*>(row.logits);
    double top = -__builtin_inf();
    for (std::int64_t i = 0; i < row.vocabulary; ++i) {
        const double value = capped(z[i], row.softcap);
        top = value > top ? value : top;
    }
    double total = 0;
    for (std::int64_t i = 0; i < row.vocabulary; ++i) {
        total += __builtin_exp(capped(z[i], row.softcap) - top);
    }
    const double logprob = capped(z[row.target], row.softcap) - top - __builtin_log(total);
    if (row.gradient) {
        for (std::int64_t i = 0; i < row.vocabulary; ++i) {
            const double p =
                i == row.target ? __builtin_expm1(logprob) : __builtin_exp(capped(z[i], row.softcap) - top) / total;
            z[i] = p * slope(z[i], row.softcap);
        }
    }
    return logprob;
}

template <typename R>
void row_divergence_fp64(const Row& row, double* divergence, double* entropy) {
    auto* z = static_cast<double*>(row.logits);
    const auto* zr = static_cast<const R*>(row.reference);
    const auto p_value = [&](std::int64_t i) { return capped(z[i], row.softcap); };
    const auto q_value = [&](std::int64_t i) {
        return capped(static_cast<double>(widen(zr[i])), row.reference_softcap) - (i == row.target ? row.shift : 0);
    };
    const auto log_total = [&](const auto& value) {
        double top = -__builtin_inf();
        for (std::int64_t i = 0; i < row.vocabulary; ++i) {
            top = value(i) > top ? value(i) : top;
        }
        double total = 0;
        for (std::int64_t i = 0; i < row.vocabulary; ++i) {
            total += __builtin_exp(value(i) - top);
        }
        return top + __builtin_log(total);
    };
    const double p_log = log_total(p_value);
    const double q_log = log_total(q_value);
    *divergence = 0;
    *entropy = 0;
    for (std::int64_t i = 0; i < row.vocabulary; ++i) {
        const double log_p = p_value(i) - p_log;
        const double log_q = q_value(i) - q_log;
        const double q = __builtin_exp(log_q);
        if (!(q <= 0)) {
            *divergence += q * (log_q - log_p);
            *entropy -= q * log_q;
        }
        if (row.gradient) {
            z[i] = (__builtin_exp(log_p) - q) * slope(z[i], row.softcap);
        }
    }
}

void exp_all(float* values, std::int64_t count) {
    for_each_vector(count, [&](std::int64_t i, int n) { store(exp(load(values + i, n, 0.0F)), values + i, n); });
}

void tanh_all(float* values, std::int64_t count) {
    for_each_vector(count, [&](std::int64_t i, int n) { store(tanh(load(values + i, n, 0.0F)), values + i, n); });
}

constexpr efface::kernels::Table table = {
    {row_logprob<Bf16>, row_logprob<Fp16>, row_logprob<float>, row_logprob_fp64},
    {{row_divergence<Bf16, Bf16>, row_divergence<Bf16, Fp16>, row_divergence<Bf16, float>, nullptr},
     {row_divergence<Fp16, Bf16>, row_divergence<Fp16, Fp16>, row_divergence<Fp16, float>, nullptr},
     {row_divergence<float, Bf16>, row_divergence<float, Fp16>, row_divergence<float, float>, nullptr},
     {row_divergence_fp64<Bf16>, row_divergence_fp64<Fp16>, row_divergence_fp64<float>, row_divergence_fp64<double>}},
    exp_all,
    tanh_all,
};

}  // namespace
