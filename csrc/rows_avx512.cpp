// The row passes for AVX-512 (F, BW, DQ, VL). The standard library must not be used below the pragma.
#include "half.hpp"
#include "row_kernels.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
// GCC 12 warns about values in this header that are undefined on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "half.inl"

namespace {

// Indices of a permutation of 32 words. The permutation is one instruction; widening and a shift, or a shift and
// narrowing, are two or three. A row pass on (256, 32000) bf16 after its GEMM takes 1.49 and 1.52 ms with it, and 1.60
// ms without (2 cores of an Intel Xeon with AMX, 2026-11-27).
struct Words {
    alignas(64) std::uint16_t at[32];
    __m512i load() const { return _mm512_load_si512(at); }
};

// Index i / 2: with the even positions set to zero, this converts bf16 to fp32.
constexpr Words doubled = {0, 0, 1, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
                           8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
// Indices of the upper words of 16 floats.
constexpr Words uppers = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

struct V {
    __m512 v;
    static constexpr int width = 16;

    static V set(float x) { return {_mm512_set1_ps(x)}; }
    static V load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static V load(const Bf16* from) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m512i wide = _mm512_maskz_permutexvar_epi16(0xaaaaaaaaU, doubled.load(), _mm512_castsi256_si512(bits));
        return {_mm512_castsi512_ps(wide)};
    }
    static V load(const Fp16* from) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
    }
    void store(float* to) const { _mm512_storeu_ps(to, v); }
    void store(Bf16* to) const {
        // Round to nearest, ties to even, with integers, because the instruction of avx512_bf16 flushes subnormal
        // numbers.
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        // A NaN that results from arithmetic is quiet, so it stays NaN when its lower bits are dropped.
        const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
        const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        const __m512i rounded = _mm512_mask_add_epi32(bits, number, bits, half);
        const __m512i packed = _mm512_permutexvar_epi16(uppers.load(), rounded);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(packed));
    }
    void store(Fp16* to) const {
        const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
    }
};

struct Mask {
    __mmask16 m;
};

inline V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Mask operator<(V a, V b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V abs(V a) { return {_mm512_abs_ps(a.v)}; }
inline V select(Mask mask, V a, V b) { return {_mm512_mask_blend_ps(mask.m, b.v, a.v)}; }
inline V times_power_of_two(V a, V n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(V a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace

#include "row_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

const efface::kernels::Table* const efface::kernels::avx512_table = &table;
#else
const efface::kernels::Table* const efface::kernels::avx512_table = nullptr;
#endif
