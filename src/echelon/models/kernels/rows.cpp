// Passes over rows that plain PyTorch takes several of: norms with their residual, activation, rotary
// positions, quantisation to eight bits with a scale of each row's own.
//
// Rows are bf16, sums of all layers fp32. A product of eight-bit codes arrives as bf16 too and still lacks the scale of its
// row and its bias; both are applied here, in fp32, on the way. Each function returns 0, or 1 if scratch
// memory could not be allocated.
#include "parallel.h"
#include "simd.h"

namespace {

enum Activation { NONE = 0, GELU = 1, GELU_TANH = 2, RELU = 3, SILU = 4 };

constexpr float GELU_END = 4.2f;
constexpr float GELU_REST[] = {4.981835698e-1f,  -3.831483906e-1f, -4.587677850e-2f, 1.276227316e-1f, -3.950628962e-2f,
                               -8.374141211e-4f, 2.644104855e-3f,  -5.080893532e-4f, 3.152502912e-5f};

// max(x, 0) - |x| Phi(-|x|), which is GELU, to 7e-5: a hundredth of a code's usual step. The second term is
// the minimax polynomial that is 0 at 0 and at GELU_END, from where on it stays there.
INLINE floats gelu(floats x) {
    const floats size = smaller(size_of(x), all(GELU_END));
    floats series = all(GELU_REST[8]);
    for (int i = 7; i >= 0; --i) series = series * size + GELU_REST[i];
    return larger(floats{}, x) - series * size;  // in this order what is no number stays that
}

INLINE floats sigmoid(floats x) {
    // exp_of needs no lower care, but must not overflow: e^88 is the largest float.
    return 1.0f / (1.0f + exp_of(smaller(-x, all(88.0f))));
}

template <int kind>
INLINE floats activation(floats x) {
    if constexpr (kind == GELU) {
        return gelu(x);
    } else if constexpr (kind == GELU_TANH) {  // x * sigmoid(2 u) is x * (1 + tanh u) / 2
        return x * sigmoid((0.044715f * (x * x * x) + x) * 1.59576912f);
    } else if constexpr (kind == RELU) {
        return larger(x, floats{});
    } else if constexpr (kind == SILU) {
        return x * sigmoid(x);
    } else {
        return x;
    }
}

// What a product lacks: value = product * scale[row] + bias[column]; nothing where null.
struct Pending {
    const float* scales;
    const float* bias;

    float scale(int64_t row) const { return scales == nullptr ? 1.0f : scales[row]; }
};

// Lanes from `count` on are 0 in all that follows, in a row's scratch too.
INLINE floats materialize(const bf16* product, const Pending& pending, float scale, int64_t column, int64_t count) {
    floats x = widen(load(product + column, count));
    if (pending.scales != nullptr) x = x * scale;
    if (pending.bias != nullptr) x = x + load(pending.bias + column, count);
    return x;
}

INLINE float largest(const floats* row, int64_t width) {
    floats top = {};
    for (int64_t v = 0; v < vectors(width); ++v) top = larger(top, size_of(row[v]));
    return largest_of(top);
}

// codes = round((value + shift) / scale) + zero; returns the scale, by which `top` becomes `range`.
INLINE float quantize(const floats* row, int64_t width, float top, float range, float shift, int zero, uint8_t* codes) {
    const float scale = top > 0.0f ? top / range : 1.0f;
    const float inverse = 1.0f / scale, origin = shift / scale + zero;
    for (int64_t c = 0; c < width; c += LANES, ++row) store(codes + c, codes_of(*row * inverse + origin), width - c);
    return scale;
}

// LayerNorm (Ba and others, 2016), or where it is not centred RMSNorm (Zhang and Sennrich, 2019).
struct Norm {
    const float* gamma;
    const float* beta;  // nothing where null
    float epsilon;
    bool centred;
};

// The norm of a row whose lanes are in `scratch` and add up to `sum`; it stays there, too.
INLINE void normalize(floats* scratch, floats sum, int64_t width, const Norm& norm, bf16* out) {
    const float mean = norm.centred ? sum_of(sum) / width : 0.0f;
    floats squares = {};
    for (int64_t c = 0; c < width; c += LANES) {
        const floats x = choose(width - c, scratch[c / LANES] - mean, floats{});
        squares += x * x;
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum_of(squares) / width + norm.epsilon);
    for (int64_t c = 0; c < width; c += LANES) {
        const int64_t count = width - c;
        floats y = (scratch[c / LANES] - mean) * inverse * load(norm.gamma + c, count);
        if (norm.beta != nullptr) y += load(norm.beta + c, count);
        scratch[c / LANES] = y;
        store(out + c, narrow(y), count);
    }
}

void norm_row(const bf16* product, const bf16* residual, const Pending& pending, float scale, int64_t width,
              const Norm& norm, floats* scratch, bf16* out) {
    floats sum = {};
    for (int64_t c = 0; c < width; c += LANES) {
        const int64_t count = width - c;
        const floats x = materialize(product, pending, scale, c, count) + widen(load(residual + c, count));
        scratch[c / LANES] = x;
        sum += x;
    }
    normalize(scratch, sum, width, norm, out);
}

void accumulate_row(float* row, const bf16* product, int64_t width, const Norm& norm, floats* scratch, bf16* out) {
    floats sum = {};
    for (int64_t c = 0; c < width; c += LANES) {
        const int64_t count = width - c;
        floats x = load(row + c, count);
        if (product != nullptr) {
            x += widen(load(product + c, count));
            store(row + c, x, count);
        }
        scratch[c / LANES] = x;
        sum += x;
    }
    normalize(scratch, sum, width, norm, out);
}

// One head; `to` may be `from`. The first half turns with the second, as in transformers.
void rotate_head(const bf16* from, bf16* to, int64_t size, const float* cosines, const float* sines, const Norm& norm) {
    const int64_t half = size / 2;
    float inverse = 1.0f;
    if (norm.gamma != nullptr) {
        floats squares = {};
        for (int64_t c = 0; c < size; c += LANES) {
            const floats x = widen(load(from + c, size - c));
            squares += x * x;
        }
        inverse = 1.0f / __builtin_sqrtf(sum_of(squares) / size + norm.epsilon);
    }
    for (int64_t c = 0; c < half; c += LANES) {
        const int64_t count = half - c, d = half + c;
        floats first = widen(load(from + c, count)), second = widen(load(from + d, count));
        if (norm.gamma != nullptr) {
            first *= inverse * load(norm.gamma + c, count);
            second *= inverse * load(norm.gamma + d, count);
        }
        store(to + c, narrow(first * load(cosines + c, count) + second * load(sines + c, count)), count);
        store(to + d, narrow(second * load(cosines + d, count) + first * load(sines + d, count)), count);
    }
}

template <int kind>
float activate_row(const bf16* product, const Pending& pending, float scale, int64_t width, floats* scratch) {
    floats top = {};
    for (int64_t c = 0; c < width; c += LANES) {
        const floats y = activation<kind>(materialize(product, pending, scale, c, width - c));
        scratch[c / LANES] = y;  // of 0 every activation is 0
        top = larger(top, y);
    }
    return largest_of(top);
}

float activate_row(int kind, const bf16* product, const Pending& pending, float scale, int64_t width, floats* scratch) {
    switch (kind) {
        case GELU: return activate_row<GELU>(product, pending, scale, width, scratch);
        case GELU_TANH: return activate_row<GELU_TANH>(product, pending, scale, width, scratch);
        case RELU: return activate_row<RELU>(product, pending, scale, width, scratch);
        case SILU: return activate_row<SILU>(product, pending, scale, width, scratch);
        default: return activate_row<NONE>(product, pending, scale, width, scratch);
    }
}

INLINE void store_row(const floats* row, int64_t width, bf16* out) {
    for (int64_t c = 0; c < width; c += LANES) store(out + c, narrow(row[c / LANES]), width - c);
}

// work(row, scratch) for each row, equal shares of them to the threads, with scratch for one row each.
template <class Work>
int for_rows(int64_t count, int64_t width, int threads, Work work) {
    const int64_t parts = threads < count ? threads : count;
    int failed = 0;
    Turns turns(parts);
    on_threads(static_cast<int>(parts), [&] {
        const Block scratch(vectors(width) * sizeof(floats));
        if (scratch.at() == nullptr) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        for (int64_t turn; turns.take(turn);) {
            const int64_t end = count * (turn + 1) / parts;
            for (int64_t r = count * turn / parts; r < end; ++r) work(r, (floats*)scratch.at());
        }
    });
    return failed;
}

}  // namespace

extern "C" {

// Threads for all kernels: the address of GOMP_parallel, or null for none but the calling one.
EXPORT void echelon_threads(Parallel address) { parallel = address; }

// Rows to codes round(x / scale) + 128, scale = max |x| / 127 of each row.
EXPORT int echelon_quantize(const bf16* rows, int64_t count, int64_t width, uint8_t* codes, float* scales,
                            int threads) {
    return for_rows(count, width, threads, [=](int64_t r, floats* scratch) {
        activate_row<NONE>(rows + r * width, {nullptr, nullptr}, 1.0f, width, scratch);
        scales[r] = quantize(scratch, width, largest(scratch, width), 127.0f, 0.0f, 128, codes + r * width);
    });
}

// out = LayerNorm(product * scale + bias + residual); with `codes`, out's own codes as well.
EXPORT int echelon_add_norm(const bf16* product, const float* scales, const float* bias, const bf16* residual,
                            int64_t count, int64_t width, const float* gamma, const float* beta, float epsilon,
                            bf16* out, uint8_t* codes, float* code_scales, int threads) {
    const Pending pending = {scales, bias};
    const Norm norm = {gamma, beta, epsilon, true};
    return for_rows(count, width, threads, [=](int64_t r, floats* scratch) {
        const int64_t at = r * width;
        norm_row(product + at, residual + at, pending, pending.scale(r), width, norm, scratch, out + at);
        if (codes != nullptr)
            code_scales[r] = quantize(scratch, width, largest(scratch, width), 127.0f, 0.0f, 128, codes + at);
    });
}

// rows += product, where there is one; out = their norm.
EXPORT int echelon_accumulate_norm(float* rows, const bf16* product, int64_t count, int64_t width, const float* gamma,
                                   const float* beta, float epsilon, int centred, bf16* out, int threads) {
    const Norm norm = {gamma, beta, epsilon, centred != 0};
    return for_rows(count, width, threads, [=](int64_t r, floats* scratch) {
        const int64_t at = r * width;
        accumulate_row(rows + at, product == nullptr ? nullptr : product + at, width, norm, scratch, out + at);
    });
}

// Heads turned by their row's cosines and signed sines, [count, size]; with `gamma` after RMSNorm of each
// head. The heads of a row lie one after the other, the next row's a stride on; `to` may be `from`.
EXPORT int echelon_rotate(const bf16* from, int64_t from_stride, bf16* to, int64_t to_stride, int64_t count, int heads,
                          int size, const float* cosines, const float* sines, const float* gamma, float epsilon,
                          int threads) {
    const Norm norm = {gamma, nullptr, epsilon, false};
    return for_rows(count, 1, threads, [=](int64_t r, floats*) {
        for (int64_t h = 0; h < heads; ++h)
            rotate_head(from + r * from_stride + h * size, to + r * to_stride + h * size, size, cosines + r * size,
                        sines + r * size, norm);
    });
}

// activation(product * scale + bias), as bf16 `out` or, with `codes`, as codes of value + shift from 0
// upwards, where no value is below -shift: a bit more than codes around a middle.
EXPORT int echelon_activate(const bf16* product, const float* scales, const float* bias, int64_t count, int64_t width,
                            int kind, bf16* out, uint8_t* codes, float* code_scales, float shift, int threads) {
    const Pending pending = {scales, bias};
    return for_rows(count, width, threads, [=](int64_t r, floats* scratch) {
        const int64_t at = r * width;
        const float top = activate_row(kind, product + at, pending, pending.scale(r), width, scratch);
        if (codes != nullptr)
            code_scales[r] = quantize(scratch, width, top + shift, 255.0f, shift, 0, codes + at);
        else
            store_row(scratch, width, out + at);
    });
}

}  // extern "C"
