// Conversions of single half-precision values, in an unnamed namespace for the reason given in row_kernels.inl.
namespace {

using efface::Bf16;
using efface::Fp16;

inline float widen(float x) { return x; }

inline double widen(double x) { return x; }

inline float widen(Bf16 x) { return __builtin_bit_cast(float, static_cast<std::uint32_t>(x.bits) << 16); }

inline float widen(Fp16 x) {
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000U) << 16;
    const std::uint32_t magnitude = x.bits & 0x7fffU;
    if (magnitude >= 0x7c00U) {  // infinity and NaN
        return __builtin_bit_cast(float, sign | 0x7f800000U | (magnitude & 0x3ffU) << 13);
    }
    // Multiplying by 2^112 changes the exponent's bias from 15 to 127 and makes subnormal numbers normal.
    const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112F;
    return __builtin_bit_cast(float, sign | __builtin_bit_cast(std::uint32_t, scaled));
}

template <typename T>
T narrow(float x);

template <>
inline float narrow<float>(float x) {
    return x;
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <>
inline Bf16 narrow<Bf16>(float x) {
    const auto bits = __builtin_bit_cast(std::uint32_t, x);
    if (x != x) {
        return {static_cast<std::uint16_t>(bits >> 16 | 0x40U)};
    }
    return {static_cast<std::uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16)};
}

template <>
inline Fp16 narrow<Fp16>(float x) {
    const auto bits = __builtin_bit_cast(std::uint32_t, x);
    const std::uint32_t sign = bits >> 16 & 0x8000U;
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    std::uint32_t half = 0;
    if (magnitude > 0x7f800000U) {
        half = 0x7e00U;  // NaN
    } else if (magnitude >= 0x477ff000U) {
        half = 0x7c00U;  // rounds to infinity
    } else if (magnitude < 0x38800000U) {
        // Subnormal result: after adding 0.5, the last bits of the sum are the rounded multiple of 2^-24.
        half = __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude) + 0.5F) - 0x3f000000U;
    } else {
        half = (magnitude - 0x38000000U + 0xfffU + (magnitude >> 13 & 1U)) >> 13;
    }
    return {static_cast<std::uint16_t>(sign | half)};
}

}  // namespace
