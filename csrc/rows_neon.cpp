// The row passes for arm64. Every arm64 processor has NEON with fused multiply-add and half-precision conversion.
#include "half.hpp"
#include "row_kernels.hpp"

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>

#include "half.inl"

namespace {

struct V {
    float32x4_t v;
    static constexpr int width = 4;

    static V set(float x) { return {vdupq_n_f32(x)}; }
    static V load(const float* from) { return {vld1q_f32(from)}; }
    static V load(const Bf16* from) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&from->bits), 16))}; }
    static V load(const Fp16* from) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)))}; }
    void store(float* to) const { vst1q_f32(to, v); }
    void store(Bf16* to) const {
        const uint32x4_t bits = vreinterpretq_u32_f32(v);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
        vst1_u16(&to->bits, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
    }
    void store(Fp16* to) const { vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
};

struct Mask {
    uint32x4_t m;
};

inline V operator+(V a, V b) { return {vaddq_f32(a.v, b.v)}; }
inline V operator-(V a, V b) { return {vsubq_f32(a.v, b.v)}; }
inline V operator*(V a, V b) { return {vmulq_f32(a.v, b.v)}; }
inline V operator/(V a, V b) { return {vdivq_f32(a.v, b.v)}; }
inline Mask operator<(V a, V b) { return {vcltq_f32(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline V max(V a, V b) { return {vmaxq_f32(a.v, b.v)}; }
inline V abs(V a) { return {vabsq_f32(a.v)}; }
inline V select(Mask mask, V a, V b) { return {vbslq_f32(mask.m, a.v, b.v)}; }

inline V power_of_two(int32x4_t n) { return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23))}; }

// Uses two factors, so that the result can be subnormal.
inline V times_power_of_two(V a, V n) {
    const float32x4_t bounded = vminq_f32(vmaxq_f32(n.v, vdupq_n_f32(-200.0F)), vdupq_n_f32(200.0F));
    const int32x4_t whole = vcvtq_s32_f32(bounded);
    const int32x4_t half = vshrq_n_s32(whole, 1);
    return a * power_of_two(half) * power_of_two(vsubq_s32(whole, half));
}

inline float sum(V a) { return vaddvq_f32(a.v); }
inline float largest(V a) { return vmaxvq_f32(a.v); }

}  // namespace

#include "row_kernels.inl"

const efface::kernels::Table* const efface::kernels::neon_table = &table;
#else
const efface::kernels::Table* const efface::kernels::neon_table = nullptr;
#endif
