// Attention over packed pairs with bf16 dot products (vdpbf16ps), any mix of lengths in one call.
//
// One task is one head of one pair. Its keys are laid out so that a vector holds two neighbouring
// components of sixteen keys, its values so that a vector holds sixteen components of two
// neighbouring keys: both products then run down memory with a broadcast on the other side. A few
// query rows at a time keep their scores in the first-level cache: no [length, length] matrix is
// ever written to memory.
#include "simd.h"

#include <cstdlib>
#include <new>

namespace {

constexpr int ROWS = 6;    // query rows at a time
constexpr int BLOCKS = 4;  // blocks of sixteen keys at a time: 24 accumulators, the other registers load

struct Scratch {
    __m512i* keys;    // [blocks, size / 2]
    __m512i* values;  // [pairs of keys, size / 16]
    float* scores;    // [ROWS, keys rounded up]
    bf16* chances;    // [ROWS, keys rounded up]
};

struct Task {
    const bf16 *query, *key, *value;  // first row of this head
    bf16* out;
    int64_t query_stride, stride, out_stride;  // elements between rows
    int queries, keys;
    float scale;
};

INLINE void transpose16(__m512i r[16]) {  // 16 x 16 dwords in place
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

template <int SIZE>
TARGET void pack_keys(const Task& task, __m512i* to) {
    for (int first = 0; first < task.keys; first += 16) {
        for (int part = 0; part < SIZE / 32; ++part) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) {
                r[i] = first + i < task.keys
                           ? _mm512_loadu_si512(task.key + (first + i) * task.stride + 32 * part)
                           : _mm512_setzero_si512();
            }
            transpose16(r);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 16 * part + i, r[i]);
        }
        to += SIZE / 2;
    }
}

template <int SIZE>
TARGET void pack_values(const Task& task, __m512i* to) {
    for (int first = 0; first < task.keys; first += 2) {
        const bf16* even = task.value + first * task.stride;
        const bool odd = first + 1 < task.keys;
        for (int part = 0; part < SIZE; part += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + part)));
            __m512i high = _mm512_setzero_si512();
            if (odd) {
                const bf16* next = even + task.stride + part;
                high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)next)), 16);
            }
            _mm512_store_si512(to++, _mm512_or_si512(low, high));
        }
    }
}

INLINE __m512bh broadcast_pair(const bf16* from) {
    return (__m512bh)_mm512_set1_epi32(*(const int32_t*)from);
}

// scores[row, key] for `R` rows and `C` blocks of sixteen keys
template <int SIZE, int R, int C>
INLINE void score_block(const bf16* query, int64_t stride, const __m512i* keys, float* to, int pitch) {
    __m512 sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    for (int p = 0; p < SIZE / 2; ++p) {
        __m512bh k[C];
        for (int c = 0; c < C; ++c) k[c] = (__m512bh)_mm512_load_si512(keys + c * (SIZE / 2) + p);
        for (int r = 0; r < R; ++r) {
            const __m512bh q = broadcast_pair(query + r * stride + 2 * p);
            for (int c = 0; c < C; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], q, k[c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) _mm512_store_ps(to + r * pitch + 16 * c, sums[r][c]);
}

template <int SIZE, int R>
INLINE void score_rows(const Task& task, const bf16* query, const Scratch& scratch, int blocks) {
    const int pitch = 16 * blocks;
    int block = 0;
    for (; block + BLOCKS <= blocks; block += BLOCKS)
        score_block<SIZE, R, BLOCKS>(query, task.query_stride, scratch.keys + block * (SIZE / 2),
                                     scratch.scores + 16 * block, pitch);
    const __m512i* keys = scratch.keys + block * (SIZE / 2);
    float* to = scratch.scores + 16 * block;
    switch (blocks - block) {
        case 3: score_block<SIZE, R, 3>(query, task.query_stride, keys, to, pitch); break;
        case 2: score_block<SIZE, R, 2>(query, task.query_stride, keys, to, pitch); break;
        case 1: score_block<SIZE, R, 1>(query, task.query_stride, keys, to, pitch); break;
        default: break;
    }
}

// Softmax of one row without its division: writes bf16 weights, returns their sum. The scale comes
// with log2(e) in it.
INLINE float soften(const float* scores, bf16* to, int keys, int blocks, float scale) {
    const __m512 lowest = _mm512_set1_ps(-3.0e38f);
    const __mmask16 end = lanes(keys - 16 * (blocks - 1));
    __m512 top = _mm512_mask_load_ps(lowest, end, scores + 16 * (blocks - 1));
    for (int b = 0; b + 1 < blocks; ++b) top = _mm512_max_ps(top, _mm512_load_ps(scores + 16 * b));
    const __m512 shift = _mm512_set1_ps(-scale * _mm512_reduce_max_ps(top));
    const __m512 factor = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps();
    for (int b = 0; b < blocks; ++b) {
        const __m512 x = _mm512_fmadd_ps(_mm512_load_ps(scores + 16 * b), factor, shift);
        const __m512 weight = _mm512_maskz_mov_ps(b + 1 < blocks ? 0xFFFF : end, exp2_coarse(x));
        sum = _mm512_add_ps(sum, weight);
        _mm256_store_si256((__m256i*)(to + 16 * b), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    return _mm512_reduce_add_ps(sum);
}

template <int SIZE, int R>
INLINE void mix_rows(const Task& task, const Scratch& scratch, int pitch, const float* sums, bf16* out) {
    constexpr int C = SIZE / 16;
    __m512 mixed[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) mixed[r][c] = _mm512_setzero_ps();
    const __m512i* values = scratch.values;
    for (int k = 0; k < task.keys; k += 2, values += C) {
        __m512bh v[C];
        for (int c = 0; c < C; ++c) v[c] = (__m512bh)_mm512_load_si512(values + c);
        for (int r = 0; r < R; ++r) {
            const __m512bh weight = broadcast_pair(scratch.chances + r * pitch + k);
            for (int c = 0; c < C; ++c) mixed[r][c] = _mm512_dpbf16_ps(mixed[r][c], weight, v[c]);
        }
    }
    for (int r = 0; r < R; ++r) {
        const __m512 share = _mm512_set1_ps(1.0f / sums[r]);
        for (int c = 0; c < C; ++c)
            store_bf16(out + r * task.out_stride + 16 * c, _mm512_mul_ps(mixed[r][c], share), 0xFFFF);
    }
}

template <int SIZE, int R>
TARGET void attend_rows(const Task& task, const Scratch& scratch, int first) {
    const int blocks = (task.keys + 15) / 16;
    const int pitch = 16 * blocks;
    score_rows<SIZE, R>(task, task.query + first * task.query_stride, scratch, blocks);
    float sums[R];
    for (int r = 0; r < R; ++r)
        sums[r] = soften(scratch.scores + r * pitch, scratch.chances + r * pitch, task.keys, blocks, task.scale);
    mix_rows<SIZE, R>(task, scratch, pitch, sums, task.out + first * task.out_stride);
}

template <int SIZE>
TARGET void attend(const Task& task, const Scratch& scratch) {
    pack_keys<SIZE>(task, scratch.keys);
    pack_values<SIZE>(task, scratch.values);
    int row = 0;
    for (; row + ROWS <= task.queries; row += ROWS) attend_rows<SIZE, ROWS>(task, scratch, row);
    switch (task.queries - row) {
        case 5: attend_rows<SIZE, 5>(task, scratch, row); break;
        case 4: attend_rows<SIZE, 4>(task, scratch, row); break;
        case 3: attend_rows<SIZE, 3>(task, scratch, row); break;
        case 2: attend_rows<SIZE, 2>(task, scratch, row); break;
        case 1: attend_rows<SIZE, 1>(task, scratch, row); break;
        default: break;
    }
}

struct Memory {  // one thread's scratch, for the longest pair of the call
    char* block;
    Scratch scratch;

    Memory(int longest, int size) {
        const size_t keys = (static_cast<size_t>(longest) + 15) / 16 * 16;
        const size_t packed = keys * size * sizeof(bf16);
        block = static_cast<char*>(std::aligned_alloc(64, 2 * packed + keys * ROWS * 6));
        if (block == nullptr) return;
        scratch = {(__m512i*)block, (__m512i*)(block + packed), (float*)(block + 2 * packed),
                   (bf16*)(block + 2 * packed + keys * ROWS * 4)};
    }
    ~Memory() { std::free(block); }
};

}  // namespace

// Attention of packed bf16 rows.
//   query: [queries, heads * size] rows, query_stride apart; pair i owns query_offsets[i..i + 1]
//   key, value: [tokens, heads * size] rows, stride apart; pair i owns offsets[i..i + 1]
//   out: [queries, heads * size], dense
// Returns 0; 1 if scratch memory could not be allocated, 2 for a head size that is not built.
extern "C" EXPORT int echelon_attention(const bf16* query, int64_t query_stride, const int32_t* query_offsets,
                                 const bf16* key, const bf16* value, int64_t stride,
                                 const int32_t* offsets, int pairs, int heads, int size, bf16* out,
                                 int threads) {
    if (size != 64 && size != 32) return 2;
    int longest = 0;
    for (int i = 0; i < pairs; ++i)
        longest = offsets[i + 1] - offsets[i] > longest ? offsets[i + 1] - offsets[i] : longest;
    const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(size));
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const Memory memory(longest, size);
        if (memory.block == nullptr) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int index = 0; index < pairs * heads; ++index) {
            const int pair = index / heads, column = index % heads * size;
            const int64_t first = offsets[pair], row = query_offsets[pair];
            const Task task = {query + row * query_stride + column,
                               key + first * stride + column,
                               value + first * stride + column,
                               out + row * heads * size + column,
                               query_stride,
                               stride,
                               static_cast<int64_t>(heads) * size,
                               query_offsets[pair + 1] - query_offsets[pair],
                               offsets[pair + 1] - offsets[pair],
                               scale};
            if (memory.block == nullptr) continue;
            size == 64 ? attend<64>(task, memory.scratch) : attend<32>(task, memory.scratch);
        }
    }
    return failed;
}
