// Passes over rows that plain PyTorch takes several of: LayerNorm with its residual, activation,
// quantisation to eight bits with a scale of each row's own.
//
// Rows are bf16. A product of eight-bit codes arrives as bf16 too and still lacks the scale of its
// row and its bias; both are applied here, in fp32, on the way.
#include "simd.h"

#include <vector>

namespace {

// What a product lacks: value = product * scale[row] + bias[column]; nothing where null.
struct Pending {
    const float* scales;
    const float* bias;
};

INLINE __m512 materialize(const bf16* product, const Pending& pending, __m512 scale, int64_t column, __mmask16 mask) {
    __m512 x = load_bf16(product + column, mask);
    if (pending.scales != nullptr) x = _mm512_mul_ps(x, scale);
    if (pending.bias != nullptr) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, pending.bias + column));
    return x;
}

INLINE __m512 row_scale(const Pending& pending, int64_t row) {
    return _mm512_set1_ps(pending.scales == nullptr ? 1.0f : pending.scales[row]);
}

INLINE float largest(const float* values, int64_t width) {
    __m512 top = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += LANES)
        top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes(width - c), values + c)));
    return _mm512_reduce_max_ps(top);
}

// codes = round((value + shift) / scale) + zero; returns the scale, by which `top` becomes `range`.
INLINE float quantize(const float* values, int64_t width, float top, float range, float shift, int zero,
                      uint8_t* codes) {
    const float scale = top > 0.0f ? top / range : 1.0f;
    const __m512 inverse = _mm512_set1_ps(1.0f / scale);
    const __m512 origin = _mm512_set1_ps(shift / scale + zero);
    for (int64_t c = 0; c < width; c += LANES) {
        const __mmask16 mask = lanes(width - c);
        const __m512 x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, values + c), inverse, origin);
        const __m512i code = _mm512_max_epi32(_mm512_cvtps_epi32(x), _mm512_setzero_si512());
        _mm_mask_storeu_epi8(codes + c, mask, _mm512_cvtusepi32_epi8(code));
    }
    return scale;
}

TARGET void norm_row(const bf16* product, const bf16* residual, const Pending& pending, __m512 scale, int64_t width,
                     const float* gamma, const float* beta, float epsilon, float* scratch, bf16* out) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += LANES) {
        const __mmask16 mask = lanes(width - c);
        const __m512 x = _mm512_add_ps(materialize(product, pending, scale, c, mask), load_bf16(residual + c, mask));
        _mm512_mask_storeu_ps(scratch + c, mask, x);
        sum = _mm512_add_ps(sum, _mm512_maskz_mov_ps(mask, x));
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += LANES) {
        const __mmask16 mask = lanes(width - c);
        const __m512 x = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, scratch + c), mean);
        squares = _mm512_fmadd_ps(x, x, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / width;
    const __m512 inverse = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + epsilon));
    for (int64_t c = 0; c < width; c += LANES) {
        const __mmask16 mask = lanes(width - c);
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scratch + c), mean), inverse);
        const __m512 y = _mm512_fmadd_ps(x, _mm512_maskz_loadu_ps(mask, gamma + c), _mm512_maskz_loadu_ps(mask, beta + c));
        _mm512_mask_storeu_ps(scratch + c, mask, y);
        store_bf16(out + c, y, mask);
    }
}

template <int kind>
TARGET float activate_row(const bf16* product, const Pending& pending, __m512 scale, int64_t width, float* scratch) {
    __m512 top = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += LANES) {
        const __mmask16 mask = lanes(width - c);
        const __m512 y = activate<kind>(materialize(product, pending, scale, c, mask));
        _mm512_mask_storeu_ps(scratch + c, mask, y);
        top = _mm512_max_ps(top, _mm512_maskz_mov_ps(mask, y));
    }
    return _mm512_reduce_max_ps(top);
}

TARGET float activate_row(int kind, const bf16* product, const Pending& pending, __m512 scale, int64_t width,
                          float* scratch) {
    switch (kind) {
        case GELU: return activate_row<GELU>(product, pending, scale, width, scratch);
        case GELU_TANH: return activate_row<GELU_TANH>(product, pending, scale, width, scratch);
        case RELU: return activate_row<RELU>(product, pending, scale, width, scratch);
        case SILU: return activate_row<SILU>(product, pending, scale, width, scratch);
        default: return activate_row<NONE>(product, pending, scale, width, scratch);
    }
}

INLINE void store_row(const float* values, int64_t width, bf16* out) {
    for (int64_t c = 0; c < width; c += LANES) {
        const __mmask16 mask = lanes(width - c);
        store_bf16(out + c, _mm512_maskz_loadu_ps(mask, values + c), mask);
    }
}

}  // namespace

extern "C" {

// 1 where this processor has what the kernels are compiled for.
EXPORT int echelon_supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}

// Rows to codes round(x / scale) + 128, scale = max |x| / 127 of each row.
EXPORT TARGET void echelon_quantize(const bf16* rows, int64_t count, int64_t width, uint8_t* codes, float* scales,
                             int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch(width);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < count; ++r) {
            const Pending none = {nullptr, nullptr};
            activate_row<NONE>(rows + r * width, none, _mm512_setzero_ps(), width, scratch.data());
            const float top = largest(scratch.data(), width);
            scales[r] = quantize(scratch.data(), width, top, 127.0f, 0.0f, 128, codes + r * width);
        }
    }
}

// out = LayerNorm(product * scale + bias + residual); with `codes`, out's own codes as well.
EXPORT TARGET void echelon_add_norm(const bf16* product, const float* scales, const float* bias, const bf16* residual,
                             int64_t count, int64_t width, const float* gamma, const float* beta, float epsilon,
                             bf16* out, uint8_t* codes, float* code_scales, int threads) {
    const Pending pending = {scales, bias};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch(width);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < count; ++r) {
            const int64_t at = r * width;
            norm_row(product + at, residual + at, pending, row_scale(pending, r), width, gamma, beta, epsilon,
                     scratch.data(), out + at);
            if (codes != nullptr) {
                const float top = largest(scratch.data(), width);
                code_scales[r] = quantize(scratch.data(), width, top, 127.0f, 0.0f, 128, codes + at);
            }
        }
    }
}

// activation(product * scale + bias), as bf16 `out` or, with `codes`, as codes of value + shift from 0
// upwards, where no value is below -shift: a bit more than codes around a middle.
EXPORT TARGET void echelon_activate(const bf16* product, const float* scales, const float* bias, int64_t count,
                             int64_t width, int kind, bf16* out, uint8_t* codes, float* code_scales, float shift,
                             int threads) {
    const Pending pending = {scales, bias};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch(width);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < count; ++r) {
            const int64_t at = r * width;
            const float top = activate_row(kind, product + at, pending, row_scale(pending, r), width, scratch.data());
            if (codes != nullptr)
                code_scales[r] = quantize(scratch.data(), width, top + shift, 255.0f, shift, 0, codes + at);
            else
                store_row(scratch.data(), width, out + at);
        }
    }
}

}  // extern "C"
