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

// 2^x to 8e-5 relative, far below the step of a bf16 probability; 0 far below. The cubic is the minimax
// one on [0, 1); scalef takes the whole part of x itself.
INLINE __m512 exp2_coarse(__m512 x) {
    const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 series = _mm512_set1_ps(7.80245243e-2f);
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(2.26067155e-1f));
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(6.95833538e-1f));
    series = _mm512_fmadd_ps(series, part, _mm512_set1_ps(9.99925218e-1f));
    return _mm512_scalef_ps(series, x);
}

constexpr float GELU_END = 4.2f;
constexpr float GELU_REST[] = {4.981835698e-1f,  -3.831483906e-1f, -4.587677850e-2f, 1.276227316e-1f, -3.950628962e-2f,
                               -8.374141211e-4f, 2.644104855e-3f,  -5.080893532e-4f, 3.152502912e-5f};

// max(x, 0) - |x| Phi(-|x|), which is GELU, to 7e-5: a hundredth of a code's usual step. The second term is
// the minimax polynomial that is 0 at 0 and at GELU_END, from where on it stays there.
INLINE __m512 gelu_ps(__m512 x) {
    const __m512 size = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(GELU_END));
    __m512 series = _mm512_set1_ps(GELU_REST[8]);
    for (int i = 7; i >= 0; --i) series = _mm512_fmadd_ps(series, size, _mm512_set1_ps(GELU_REST[i]));
    const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), x);  // in this order NaN stays NaN
    return _mm512_fnmadd_ps(series, size, positive);
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
        return gelu_ps(x);
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
