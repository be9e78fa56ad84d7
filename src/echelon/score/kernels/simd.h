// Small vocabulary over AVX-512: bf16 rows in and out, exp, the activations.
//
// Everything here is compiled for processors with AVX-512 BF16 and VNNI whatever the rest of the
// build targets; callers ask echelon_supported() first.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINE TARGET static inline __attribute__((always_inline))

#define EXPORT __attribute__((visibility("default")))

using bf16 = uint16_t;
constexpr int LANES = 16;

INLINE __mmask16 lanes(int64_t count) {  // the first `count` lanes, all of them from 16 on
    return count >= LANES ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1);
}

INLINE __m512 load_bf16(const bf16* from, __mmask16 mask) {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void store_bf16(bf16* to, __m512 values, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

// exp(x) to 3e-7 relative for x in [-87, 88]; 0 below. 2^x = 2^n * 2^f with |f| <= 1/2, 2^f by its
// Taylor series in f * ln 2.
INLINE __m512 exp_ps(__m512 x) {
    const __m512 scaled = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-126.0f * 0.6931472f)),
                                        _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(scaled, whole);
    __m512 series = _mm512_set1_ps(1.54035304e-4f);
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(1.33335581e-3f));
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(9.61812911e-3f));
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(5.55041087e-2f));
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(2.40226507e-1f));
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(6.93147181e-1f));
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(series, whole);
}

// The same to 4e-5, far below the step of a bf16 probability.
INLINE __m512 exp_coarse(__m512 x) {
    const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(scaled, whole);
    __m512 series = _mm512_set1_ps(9.61812911e-3f);
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(5.55041087e-2f));
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(2.40226507e-1f));
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(6.93147181e-1f));
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(series, whole);
}

constexpr float GELU_ERF[] = {7.978148460e-1f, -1.327206939e-1f, 1.966021582e-2f, -2.228279132e-3f, 1.891455613e-4f,
                              -1.152118511e-5f, 4.687128978e-7f, -1.126591531e-8f, 1.199516458e-10f};

// erf(x / sqrt(2)) to 3e-5: an odd polynomial (least squares, reweighted towards its largest error)
// on |x| <= 4.2, the sign beyond. GELU gets 6e-5 of it, a hundredth of what bf16 or a code rounds off.
INLINE __m512 erf_of_gelu(__m512 x) {
    const __m512 square = _mm512_mul_ps(x, x);
    __m512 series = _mm512_set1_ps(GELU_ERF[8]);
    for (int i = 7; i >= 0; --i) series = _mm512_fmadd_ps(series, square, _mm512_set1_ps(GELU_ERF[i]));
    const __m512 sign = _mm512_or_ps(_mm512_and_ps(x, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1.0f));
    const __mmask16 inside = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(4.2f), _CMP_LT_OQ);
    return _mm512_mask_mul_ps(sign, inside, x, series);
}

INLINE __m512 sigmoid_ps(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    // exp_ps needs no lower care, but must not overflow: e^88 is the largest float.
    const __m512 low = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(88.0f));
    return _mm512_div_ps(one, _mm512_add_ps(one, exp_ps(low)));
}

enum Activation { NONE = 0, GELU = 1, GELU_TANH = 2, RELU = 3, SILU = 4 };

template <int kind>
INLINE __m512 activate(__m512 x) {
    if constexpr (kind == GELU) {
        const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
        return _mm512_fmadd_ps(half, erf_of_gelu(x), half);
    } else if constexpr (kind == GELU_TANH) {  // x * sigmoid(2 u) is x * (1 + tanh u) / 2
        const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        const __m512 inner = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x);
        return _mm512_mul_ps(x, sigmoid_ps(_mm512_mul_ps(inner, _mm512_set1_ps(1.59576912f))));
    } else if constexpr (kind == RELU) {
        return _mm512_max_ps(x, _mm512_setzero_ps());
    } else if constexpr (kind == SILU) {
        return _mm512_mul_ps(x, sigmoid_ps(x));
    } else {
        return x;
    }
}
