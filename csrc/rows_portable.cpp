// The row passes in standard C++, for any processor. Compilers vectorise the loops over lanes if they can.
#include "half.hpp"
#include "half.inl"
#include "row_kernels.hpp"

namespace {

struct V {
    float lane[8];
    static constexpr int width = 8;

    static V set(float x) {
        V v;
        for (float& to : v.lane) {
            to = x;
        }
        return v;
    }
    template <typename T>
    static V load(const T* from) {
        V v;
        for (int i = 0; i < width; ++i) {
            v.lane[i] = widen(from[i]);
        }
        return v;
    }
    template <typename T>
    void store(T* to) const {
        for (int i = 0; i < width; ++i) {
            to[i] = narrow<T>(lane[i]);
        }
    }
};

struct Mask {
    bool lane[V::width];
};

template <typename Function>
inline V map(Function function) {
    V v;
    for (int i = 0; i < V::width; ++i) {
        v.lane[i] = function(i);
    }
    return v;
}

inline V operator+(const V& a, const V& b) {
    return map([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline V operator-(const V& a, const V& b) {
    return map([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline V operator*(const V& a, const V& b) {
    return map([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline V operator/(const V& a, const V& b) {
    return map([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline Mask operator<(const V& a, const V& b) {
    Mask m;
    for (int i = 0; i < V::width; ++i) {
        m.lane[i] = a.lane[i] < b.lane[i];
    }
    return m;
}
inline V fma(const V& a, const V& b, const V& c) { return a * b + c; }
inline V max(const V& a, const V& b) {
    return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline V abs(const V& a) {
    return map([&](int i) { return __builtin_fabsf(a.lane[i]); });
}
inline V select(const Mask& mask, const V& a, const V& b) {
    return map([&](int i) { return mask.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline float power_of_two(std::int32_t n) { return __builtin_bit_cast(float, (n + 127) << 23); }

// Uses two factors, so that the result can be subnormal. NaN fails the comparison and is replaced by a bound.
inline V times_power_of_two(const V& a, const V& n) {
    return map([&](int i) {
        const float low = n.lane[i] > -200.0F ? n.lane[i] : -200.0F;
        const auto whole = static_cast<std::int32_t>(low < 200.0F ? low : 200.0F);
        const std::int32_t half = whole >> 1;
        return a.lane[i] * power_of_two(half) * power_of_two(whole - half);
    });
}
inline float sum(const V& a) {
    return ((a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6])) + ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]));
}
inline float largest(const V& a) {
    float top = a.lane[0];
    for (const float x : a.lane) {
        top = x > top ? x : top;
    }
    return top;
}

}  // namespace

#include "row_kernels.inl"

const efface::kernels::Table* const efface::kernels::portable_table = &table;
