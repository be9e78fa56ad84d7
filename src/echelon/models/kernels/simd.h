// A small vector layer: LANES numbers at a time in the compilers' own vector types (GCC, Clang).
//
// hatch_build.py compiles the kernels once for each level, with the instructions of that level; which
// those are says the compiler. An intrinsic stands here only where an instruction has no other name.
// ECHELON_PORTABLE leaves all of them out.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(ECHELON_PORTABLE)
#define LEVEL_LANES 4
#elif defined(__AVX512F__)
#include <immintrin.h>
#define LEVEL_AVX512
#define LEVEL_LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define LEVEL_AVX2
#define LEVEL_LANES 8
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define LEVEL_NEON
#define LEVEL_LANES 4
#else
#error "no level for these instructions: define ECHELON_PORTABLE"
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

using bf16 = uint16_t;
constexpr int LANES = LEVEL_LANES;

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

INLINE int64_t vectors(int64_t width) { return (width + LANES - 1) / LANES; }

INLINE floats all(float x) { return x - floats{}; }  // x - 0 is x for every x, unlike 0 + x

// b where either is no number. Compilers find the instruction for this only in simple surroundings.
#if defined(LEVEL_AVX512)
INLINE floats larger(floats a, floats b) { return (floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE floats smaller(floats a, floats b) { return (floats)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(LEVEL_AVX2)
INLINE floats larger(floats a, floats b) { return (floats)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE floats smaller(floats a, floats b) { return (floats)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE floats larger(floats a, floats b) { return a > b ? a : b; }
INLINE floats smaller(floats a, floats b) { return a < b ? a : b; }
#endif

INLINE floats size_of(floats x) { return (floats)((ints)x & 0x7fffffff); }

// Lanes chosen by number: lane i of the result is lane `Order::of(i)` of a and b one after the other.
template <class Order, class Vector, size_t... lane>
INLINE Vector pick(Vector a, Vector b, std::index_sequence<lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Order::of(lane)...);
#else
    return __builtin_shuffle(a, b, ints{Order::of(lane)...});
#endif
}

template <class Order, class Vector>
INLINE Vector pick(Vector a, Vector b) {
    return pick<Order>(a, b, std::make_index_sequence<LANES>{});
}

template <int distance>
struct Across {
    static constexpr int of(int lane) { return lane ^ distance; }
};

template <int from>  // 0: the lower halves of both, lane by lane; LANES / 2: the upper ones
struct Zipped {
    static constexpr int of(int lane) { return from + lane / 2 + lane % 2 * LANES; }
};

template <int distance = LANES / 2>
INLINE float sum_of(floats x) {
    x += pick<Across<distance>>(x, x);
    if constexpr (distance > 1) return sum_of<distance / 2>(x);
    return x[0];
}

template <int distance = LANES / 2>
INLINE float largest_of(floats x) {
    x = larger(x, pick<Across<distance>>(x, x));
    if constexpr (distance > 1) return largest_of<distance / 2>(x);
    return x[0];
}

INLINE void transpose(ints rows[LANES]) {  // LANES x LANES, in place: each round interleaves the halves
    for (int round = 1; round < LANES; round *= 2) {
        ints next[LANES];
        for (int i = 0; i < LANES / 2; ++i) {
            next[2 * i] = pick<Zipped<0>>(rows[i], rows[i + LANES / 2]);
            next[2 * i + 1] = pick<Zipped<LANES / 2>>(rows[i], rows[i + LANES / 2]);
        }
        for (int i = 0; i < LANES; ++i) rows[i] = next[i];
    }
}

INLINE void store(float* to, floats x) { std::memcpy(to, &x, sizeof x); }

INLINE floats widen(halves x) { return (floats)(__builtin_convertvector(x, words) << 16); }

INLINE halves narrow(floats x) {  // to the nearest, ties to even
#if defined(__AVX512BF16__) && defined(LEVEL_AVX512)
    return (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    const words bits = (words)x;
    const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const words found = x == x ? rounded : words{} + 0x7fc0;
#if defined(LEVEL_AVX2)
    const __m256i both = (__m256i)found;
    return (halves)_mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
#else
    return __builtin_convertvector(found, halves);
#endif
#endif
}

#if defined(LEVEL_AVX512)

INLINE __mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

INLINE floats load_some(const float* from, int64_t count) { return (floats)_mm512_maskz_loadu_ps(lanes(count), from); }

INLINE halves load_some(const bf16* from, int64_t count) {
    return (halves)_mm256_maskz_loadu_epi16(lanes(count), from);
}

INLINE void store_some(float* to, floats x, int64_t count) { _mm512_mask_storeu_ps(to, lanes(count), (__m512)x); }

INLINE void store_some(bf16* to, halves x, int64_t count) { _mm256_mask_storeu_epi16(to, lanes(count), (__m256i)x); }

INLINE void store_some(uint8_t* to, bytes x, int64_t count) { _mm_mask_storeu_epi8(to, lanes(count), (__m128i)x); }

INLINE floats choose_some(int64_t count, floats x, floats beyond) {
    return (floats)_mm512_mask_mov_ps((__m512)beyond, lanes(count), (__m512)x);
}

INLINE floats fraction(floats x) {  // x minus the next whole number below
    return (floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

INLINE floats nearest(floats x) {
    return (floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

INLINE floats times_power(floats x, floats exponent) {  // x * 2^floor(exponent); 0 far below
    return (floats)_mm512_scalef_ps((__m512)x, (__m512)exponent);
}

INLINE bytes codes_of(floats x) {  // to the nearest whole number, within 0 and 255
    const __m512i code = _mm512_max_epi32(_mm512_cvtps_epi32((__m512)x), _mm512_setzero_si512());
    return (bytes)_mm512_cvtusepi32_epi8(code);
}

#else

// Rare, and calls: what they would keep in registers, the loops around them need.
#define RARE static __attribute__((noinline, cold, unused))

template <class Vector, class Number>
INLINE Vector gather(const Number* from, int64_t count) {
    Vector x = {};
    for (int64_t i = 0; i < count; ++i) x[i] = from[i];
    return x;
}

RARE floats load_some(const float* from, int64_t count) { return gather<floats>(from, count); }

RARE halves load_some(const bf16* from, int64_t count) { return gather<halves>(from, count); }

template <class Vector, class Number>
RARE void store_some(Number* to, Vector x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = x[i];
}

RARE floats choose_some(int64_t count, floats x, floats beyond) {
    for (int64_t i = count; i < LANES; ++i) x[i] = beyond[i];
    return x;
}

INLINE floats below(floats x) {  // the next whole number below, for |x| < 2^31
#if defined(LEVEL_AVX2)
    return (floats)_mm256_floor_ps((__m256)x);
#elif defined(LEVEL_NEON)
    return (floats)vrndmq_f32((float32x4_t)x);
#else
    const floats whole = __builtin_convertvector(__builtin_convertvector(x, ints), floats);
    return whole + __builtin_convertvector((ints)(whole > x), floats);  // a lane that is true is -1
#endif
}

INLINE floats fraction(floats x) { return x - below(x); }

INLINE floats nearest(floats x) { return below(x + 0.5f); }

INLINE floats times_power(floats x, floats exponent) {
    const ints whole = __builtin_convertvector(below(larger(exponent, all(-127.0f))), ints);
    return x * (floats)((whole + 127) << 23);  // of -127 the bits are those of 0
}

INLINE bytes codes_of(floats x) {  // to the nearest whole number, within 0 and 255
#if defined(LEVEL_AVX2)
    const __m256i code = _mm256_cvtps_epi32((__m256)x);
    const __m128i two = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    return (bytes)_mm_cvtsi128_si64(_mm_packus_epi16(two, two));
#else
    constexpr float MIDDLE = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to whole numbers
    const floats within = smaller(larger(x, floats{}), all(255.0f));
    return __builtin_convertvector((words)(within + MIDDLE) & 0xff, bytes);
#endif
}

#endif

// As the plain ones, but of `count` lanes at most; the others are 0, and stay as they are in memory.
template <class Number>
INLINE auto load(const Number* from, int64_t count) {
    if (count < LANES) return load_some(from, count);
    decltype(load_some(from, count)) x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class Number, class Vector>
INLINE void store(Number* to, Vector x, int64_t count) {
    if (count < LANES) return store_some(to, x, count);
    std::memcpy(to, &x, sizeof x);
}

INLINE floats choose(int64_t count, floats x, floats beyond) {  // x, and `beyond` in the lanes from count on
    return count < LANES ? choose_some(count, x, beyond) : x;
}

// exp(x) to 3e-7 relative for x in [-87, 88]; 0 below. 2^x = 2^n * 2^f with |f| <= 1/2, 2^f by its
// Taylor series in f * ln 2.
INLINE floats exp_of(floats x) {
    const floats scaled = larger(x, all(-126.0f * 0.6931472f)) * 1.44269504f;
    const floats whole = nearest(scaled);
    const floats part = scaled - whole;
    floats series = all(1.54035304e-4f);
    series = series * part + 1.33335581e-3f;
    series = series * part + 9.61812911e-3f;
    series = series * part + 5.55041087e-2f;
    series = series * part + 2.40226507e-1f;
    series = series * part + 6.93147181e-1f;
    series = series * part + 1.0f;
    return times_power(series, whole);
}

// 2^x to 8e-5 relative, far below the step of a bf16 probability; 0 far below. The cubic is the minimax
// one on [0, 1).
INLINE floats exp2_coarse(floats x) {
    const floats part = fraction(x);
    floats series = all(7.80245243e-2f);
    series = series * part + 2.26067155e-1f;
    series = series * part + 6.95833538e-1f;
    series = series * part + 9.99925218e-1f;
    return times_power(series, x);
}
