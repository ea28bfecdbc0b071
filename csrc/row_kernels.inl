// The arithmetic of the row passes, for a vector type `V` that the including file defines:
//
//   V::width, V::set(x), V::load(const T*), V::store(T*) for T in float, Bf16, Fp16;
//   + - * /, fma(a, b, c) = a b + c, max(a, b), which is NaN if b is NaN, abs, select(mask, a, b), a < b,
//   times_power_of_two(x, n), sum(v), largest(v)
//
// Everything is in an unnamed namespace, so that each backend's translation unit has its own copy. If the linker merged
// copies, instructions of one backend could run on a machine that does not support them.
namespace {

using efface::Element;
using efface::kernels::Row;
using efface::kernels::RowPair;

// e^x, ≤ 1 ulp in [-87, 88], gradual underflow down to -104 (the polynomial of Cephes' expf); NaN for NaN.
inline V exp_in_range(V x) {
    // x = n ln 2 + r, |r| ≤ ln 2 / 2. ln 2 is split into two parts, so that n ln 2 is exact to the last bit of r.
    // Adding and subtracting 1.5 · 2^23 rounds to the nearest integer, ties to even.
    const V n = fma(x, V::set(1.44269504088896341F), V::set(0x1.8p23F)) - V::set(0x1.8p23F);
    V r = fma(n, V::set(-0.693359375F), x);
    r = fma(n, V::set(2.12194440e-4F), r);
    V p = V::set(1.9875691500e-4F);
    p = fma(p, r, V::set(1.3981999507e-3F));
    p = fma(p, r, V::set(8.3334519073e-3F));
    p = fma(p, r, V::set(4.1665795894e-2F));
    p = fma(p, r, V::set(1.6666665459e-1F));
    p = fma(p, r, V::set(5.0000001201e-1F));
    p = fma(p, r * r, r) + V::set(1.0F);
    return times_power_of_two(p, n);
}

// e^x for x ≤ 0, the case of all values relative to a maximum. e^−104 rounds to 0.
inline V exp_below_one(V x) { return exp_in_range(max(V::set(-104.0F), x)); }

// e^x for any x. The comparisons are false for NaN, so NaN is returned for NaN.
inline V exp(V x) {
    const V y = select(x < V::set(-104.0F), V::set(0.0F), exp_in_range(x));
    return select(V::set(88.7228394F) < x, V::set(__builtin_inff()), y);
}

// tanh x, ≤ 2 ulp (Cephes' tanhf: a polynomial near 0, where 1 − 2 / (e^2x + 1) would lose digits to cancellation).
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

// Calls body(i, n) for each vector of a row, where n is V::width, or less for the last vector.
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

// Calls body(begin, end) for blocks of 64 vectors. Each block is summed in fp32, and the sums of the blocks in fp64:
// with 128256 terms, the rounding error of one running fp32 sum would exceed all other errors.
template <typename Body>
inline void for_each_block(std::int64_t count, Body body) {
    constexpr std::int64_t block = 64 * V::width;
    for (std::int64_t begin = 0; begin < count; begin += block) {
        body(begin, begin + block < count ? begin + block : count);
    }
}

// Loads n elements. The last vector of a row is loaded through a buffer, and lanes beyond the row are set to `fill`.
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

// max() can drop a NaN. The sum of the exponentials does not, so a row that contains a NaN gives NaN.
template <typename T>
float row_maximum(const T* logits, std::int64_t vocabulary) {
    V top = V::set(lowest);
    for_each_vector(vocabulary, [&](std::int64_t i, int n) { top = max(top, load(logits + i, n, lowest)); });
    return largest(top);
}

// values ← logits, plus `residuals` unless they are null, capped unless `softcap` is 0; returns the maximum.
template <typename T>
float row_values(const T* logits, const T* residuals, std::int64_t vocabulary, float softcap, float* values) {
    const auto sweep = [&](const auto& value) {
        V top = V::set(lowest);
        for_each_vector(vocabulary, [&](std::int64_t i, int n) {
            const V z = value(i, n);
            store(z, values + i, n);
            // tanh turns the fill into −cap, so reload the last vector: only values of the row enter the maximum
            top = max(top, n == V::width ? z : load(values + i, n, lowest));
        });
        return largest(top);
    };
    const auto plain = [&](std::int64_t i, int n) { return load(logits + i, n, lowest); };
    const auto whole = [&](std::int64_t i, int n) { return plain(i, n) + load(residuals + i, n, 0.0F); };
    const auto capped = [&](const auto& value) {
        return [&value, cap = V::set(softcap), inverse = V::set(1.0F / softcap)](std::int64_t i, int n) {
            return cap * tanh(value(i, n) * inverse);
        };
    };
    if (softcap == 0.0F) {
        return residuals == nullptr ? sweep(plain) : sweep(whole);
    }
    return residuals == nullptr ? sweep(capped(plain)) : sweep(capped(whole));
}

// Prefetches the element `ahead` bytes away while the processor computes exponentials, because the logits of a GEMM are
// not in the L2 cache. The row pass on (256, 32000) bf16 after its GEMM takes 1.42 ms instead of 1.66 ms (2 cores of an
// Intel Xeon with AMX, 2026-11-27). The distribution pass, which reads four times as many rows, did not become faster.
template <typename T>
inline void prefetch(const T* element, std::int64_t ahead) {
    __builtin_prefetch(reinterpret_cast<const char*>(element) + ahead, 0, 2);
}

// Returns Σ e^(z − top), and stores the terms in `keep` unless it is null (`keep` can be `from` itself).
template <typename T>
double row_exponentials(const T* from, std::int64_t vocabulary, float top, float* keep, std::int64_t ahead) {
    const V shift = V::set(top);
    double total = 0;
    for_each_block(vocabulary, [&](std::int64_t begin, std::int64_t end) {
        V part = V::set(0.0F);
        for_each_vector(end - begin, [&](std::int64_t i, int n) {
            prefetch(from + begin + i, ahead);
            // the fill of the last vector becomes e^(−∞) = 0, unless top is infinite and the row is NaN anyway
            const V e = exp_below_one(load(from + begin + i, n, lowest) - shift);
            if (keep != nullptr) {
                store(e, keep + begin + i, n);
            }
            part = part + e;
        });
        total += static_cast<double>(sum(part));
    });
    return total;
}

// Derivative of the cap, 1 − tanh²(z / cap), from the uncapped z and inverse = 1 / cap.
inline V cap_slope(V z, V inverse) {
    const V t = tanh(z * inverse);
    return (V::set(1.0F) - t) * (V::set(1.0F) + t);
}

template <typename T>
double row_logprob(const Row& row) {
    auto* logits = static_cast<T*>(row.logits);
    float* scratch = row.scratch;
    const auto softcap = static_cast<float>(row.softcap);
    const bool plain = softcap == 0.0F;
    float* keep = row.gradient ? scratch : nullptr;
    const float top =
        plain ? row_maximum(logits, row.vocabulary) : row_values<T>(logits, nullptr, row.vocabulary, softcap, scratch);
    const float target = plain ? widen(logits[row.target]) : scratch[row.target];
    const double total = plain ? row_exponentials(logits, row.vocabulary, top, keep, row.ahead)
                               : row_exponentials(scratch, row.vocabulary, top, keep, 0);
    const double logprob = static_cast<double>(target - top) - __builtin_log(total);
    if (row.gradient) {
        const V scale = V::set(static_cast<float>(1 / total));
        const float entry = static_cast<float>(__builtin_expm1(logprob));
        if (plain) {
            for_each_vector(row.vocabulary,
                            [&](std::int64_t i, int n) { store(load(scratch + i, n, 0.0F) * scale, logits + i, n); });
            logits[row.target] = narrow<T>(entry);
        } else {
            scratch[row.target] = static_cast<float>(static_cast<double>(entry) * total);
            const V inverse = V::set(1.0F / softcap);
            for_each_vector(row.vocabulary, [&](std::int64_t i, int n) {
                const V slope = cap_slope(load(logits + i, n, 0.0F), inverse);
                store(load(scratch + i, n, 0.0F) * scale * slope, logits + i, n);
            });
        }
    }
    return logprob;
}

// Calls write(into) with the row's destination as a pointer to elements of at most 32 bits.
template <typename Write>
inline void with_destination(const RowPair& row, Write write) {
    if (row.into_element == Element::bf16) {
        write(static_cast<Bf16*>(row.into));
    } else if (row.into_element == Element::fp16) {
        write(static_cast<Fp16*>(row.into));
    } else {
        write(static_cast<float*>(row.into));
    }
}

// Sums of a sweep over both rows: p = Σ e^(z − p_top) and q = Σ e, where e = e^(zr − q_top), and
// apart = Σ e ((zr − q_top) − (z − p_top)) and own = Σ e (zr − q_top).
struct PairSums {
    double p = 0;
    double q = 0;
    double apart = 0;
    double own = 0;
};

// Replaces z in `p` and zr in `q` by the exponentials. log(q / p) is computed as a difference of logits, not of
// logarithms. If the maxima of the two models are close, zr − z is computed first, because the difference of two close
// logits is exact. Otherwise the maxima are subtracted first.
inline PairSums pair_exponentials(float* p, float* q, std::int64_t vocabulary, float p_top, float q_top) {
    const V zero = V::set(0.0F);
    const V tops = V::set(q_top - p_top);
    const bool close = __builtin_fabsf(q_top - p_top) < 8.0F;
    PairSums sums;
    for_each_block(vocabulary, [&](std::int64_t begin, std::int64_t end) {
        V p_part = zero;
        V q_part = zero;
        V apart = zero;
        V own = zero;
        for_each_vector(end - begin, [&](std::int64_t at, int n) {
            const std::int64_t i = begin + at;
            const V z = load(p + i, n, lowest);
            const V zr = load(q + i, n, lowest);
            const V from_top = zr - V::set(q_top);
            const V from_p_top = z - V::set(p_top);
            const V e = exp_below_one(from_p_top);
            const V er = exp_below_one(from_top);
            // q log q → 0 as q → 0: a class with q = 0 adds nothing, whatever p is. NaN is not 0 and stays in the sums.
            const auto present = zero < er;
            apart = fma(er, select(present, close ? (zr - z) - tops : from_top - from_p_top, er), apart);
            own = fma(er, select(present, from_top, er), own);
            p_part = p_part + e;
            q_part = q_part + er;
            store(e, p + i, n);
            store(er, q + i, n);
        });
        sums.p += static_cast<double>(sum(p_part));
        sums.q += static_cast<double>(sum(q_part));
        sums.apart += static_cast<double>(sum(apart));
        sums.own += static_cast<double>(sum(own));
    });
    return sums;
}

// Writes p − q from the exponentials and their sums, times the slope of the cap.
template <typename T>
void write_difference(const RowPair& row, const PairSums& sums) {
    const auto* logits = static_cast<const T*>(row.logits);
    const auto* residuals = static_cast<const T*>(row.residual);
    const float* p = row.scratch;
    const float* q = row.reference_scratch;
    const auto softcap = static_cast<float>(row.softcap);
    const V scale = V::set(static_cast<float>(1 / sums.p));
    // (e − er · sums.p / sums.q) · scale, which is exactly 0 for equal distributions.
    const V ratio = V::set(static_cast<float>(-sums.p / sums.q));
    const auto difference = [&](std::int64_t i, int n) {
        return fma(load(q + i, n, 0.0F), ratio, load(p + i, n, 0.0F)) * scale;
    };
    with_destination(row, [&](auto* into) {
        if (softcap == 0.0F) {
            for_each_vector(row.vocabulary, [&](std::int64_t i, int n) { store(difference(i, n), into + i, n); });
            return;
        }
        const V inverse = V::set(1.0F / softcap);
        for_each_vector(row.vocabulary, [&](std::int64_t i, int n) {
            V z = load(logits + i, n, 0.0F);
            if (residuals != nullptr) {
                z = z + load(residuals + i, n, 0.0F);
            }
            store(difference(i, n) * cap_slope(z, inverse), into + i, n);
        });
    });
}

template <typename T, typename R>
void row_divergence(const RowPair& row, double* divergence, double* entropy) {
    const auto* logits = static_cast<const T*>(row.logits);
    const auto* residual = static_cast<const T*>(row.residual);
    const auto* reference = static_cast<const R*>(row.reference);
    const auto* reference_residual = static_cast<const R*>(row.reference_residual);
    float* p = row.scratch;
    float* q = row.reference_scratch;
    const std::int64_t count = row.vocabulary;
    const float p_top = row_values(logits, residual, count, static_cast<float>(row.softcap), p);
    float q_top = row_values(reference, reference_residual, count, static_cast<float>(row.reference_softcap), q);
    if (row.shift != 0) {
        q[row.target] -= static_cast<float>(row.shift);
        q_top = row_maximum(q, count);
    }
    const PairSums sums = pair_exponentials(p, q, count, p_top, q_top);
    const double q_log = __builtin_log(sums.q);
    *divergence = sums.apart / sums.q + (__builtin_log(sums.p) - q_log);
    *entropy = q_log - sums.own / sums.q;
    if (row.into != nullptr) {
        write_difference<T>(row, sums);
    }
}

// fp64: the same formulas, one element at a time; used for exact comparisons and not optimised.
// Not inlined: the compiler could fuse the product with the subtraction in one caller and not in another, and equal
// models would then differ in the last bit.
[[gnu::noinline]] double capped(double z, double cap) { return cap == 0 ? z : cap * __builtin_tanh(z / cap); }

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

inline void assign(double& to, double x) { to = x; }

template <typename T>
void assign(T& to, double x) {
    to = narrow<T>(static_cast<float>(x));
}

template <typename R>
void row_divergence_fp64(const RowPair& row, double* divergence, double* entropy) {
    const auto value = [](const auto* values, const auto* residuals, std::int64_t i) {
        const auto x = static_cast<double>(widen(values[i]));
        return residuals == nullptr ? x : x + static_cast<double>(widen(residuals[i]));
    };
    const auto uncapped = [&](std::int64_t i) {
        return value(static_cast<const double*>(row.logits), static_cast<const double*>(row.residual), i);
    };
    const auto p_value = [&](std::int64_t i) { return capped(uncapped(i), row.softcap); };
    const auto q_value = [&](std::int64_t i) {
        const double zr = value(static_cast<const R*>(row.reference), static_cast<const R*>(row.reference_residual), i);
        const double capped_zr = capped(zr, row.reference_softcap);
        return i == row.target ? capped_zr - row.shift : capped_zr;
    };
    struct Normalisation {
        double top;
        double log_total;
        double operator()(double x) const { return (x - top) - log_total; }
    };
    const auto normalisation = [&](const auto& value_of) {
        double top = -__builtin_inf();
        for (std::int64_t i = 0; i < row.vocabulary; ++i) {
            top = value_of(i) > top ? value_of(i) : top;
        }
        double total = 0;
        for (std::int64_t i = 0; i < row.vocabulary; ++i) {
            total += __builtin_exp(value_of(i) - top);
        }
        return Normalisation{.top = top, .log_total = __builtin_log(total)};
    };
    const Normalisation of_p = normalisation(p_value);
    const Normalisation of_q = normalisation(q_value);
    *divergence = 0;
    *entropy = 0;
    const auto write = [&](auto* into) {
        for (std::int64_t i = 0; i < row.vocabulary; ++i) {
            const double log_p = of_p(p_value(i));
            const double log_q = of_q(q_value(i));
            const double q = __builtin_exp(log_q);
            if (!(q <= 0)) {
                *divergence += q * (log_q - log_p);
                *entropy -= q * log_q;
            }
            if (into != nullptr) {
                assign(into[i], (__builtin_exp(log_p) - q) * slope(uncapped(i), row.softcap));
            }
        }
    };
    if (row.into_element == Element::fp64) {
        write(static_cast<double*>(row.into));
    } else {
        with_destination(row, write);
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
