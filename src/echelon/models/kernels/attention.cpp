// Attention over packed pairs, any mix of lengths in one call.
//
// One task is one head of one pair. Its keys are laid out so that a vector holds one group of components
// of LANES keys, its values so that a vector holds LANES components of one group of keys: both products
// then run down memory with a broadcast on the other side. A group is what one instruction multiplies and
// adds up in each lane: two bf16 numbers where the processor can, else one in fp32. A few query rows at a
// time keep their scores in the first-level cache: no [length, length] matrix is ever written to memory.
#include "parallel.h"
#include "simd.h"

namespace {

constexpr int ROWS = 6;  // query rows at a time
// Vectors of keys at a time, so that the sums, and what they are made of, fit the registers.
#if defined(LEVEL_AVX512) || defined(LEVEL_NEON)
constexpr int BLOCKS = 4;
#else
constexpr int BLOCKS = 2;
#endif

#if defined(LEVEL_AVX512) && defined(__AVX512BF16__)

constexpr int GROUP = 2;
using part = bf16;

INLINE ints load_groups(const bf16* from) {
    ints x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

INLINE ints join(halves even, halves odd) {  // groups of two neighbouring keys
    return (ints)(__builtin_convertvector(even, words) | __builtin_convertvector(odd, words) << 16);
}

INLINE ints broadcast(const part* group) {
    int32_t two;
    std::memcpy(&two, group, sizeof two);
    return two - ints{};
}

INLINE floats dot(floats sum, ints a, ints b) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

INLINE void store_parts(part* to, floats x) { store(to, narrow(x), LANES); }

#else

constexpr int GROUP = 1;
using part = float;

INLINE ints load_groups(const bf16* from) { return (ints)widen(load(from, LANES)); }

INLINE ints join(halves only, halves) { return (ints)widen(only); }

INLINE ints broadcast(const part* group) { return (ints)all(*group); }

INLINE floats dot(floats sum, ints a, ints b) { return sum + (floats)a * (floats)b; }

INLINE void store_parts(part* to, floats x) { store(to, x); }

#endif

struct Scratch {
    ints* keys;     // [blocks, size / GROUP]
    ints* values;   // [groups of keys, size / LANES]
    float* scores;  // [ROWS, keys rounded up], then [ROWS, size]
    part* chances;  // [ROWS, keys rounded up]
    part* query;    // [ROWS, size]
};

struct Task {
    const bf16 *query, *key, *value;  // first row of this head
    bf16* out;
    int64_t query_stride, stride, out_stride;  // elements between rows
    int queries, keys;
    float scale;
};

// work(number), for a number from 1 to `most` that the compiler is to know.
template <int most, class Work>
INLINE void with_constant(int number, Work work) {
    if (number == most) {
        work(std::integral_constant<int, most>{});
    } else if constexpr (most > 1) {
        with_constant<most - 1>(number, work);
    }
}

template <int size>
void pack_keys(const Task& task, ints* to) {
    for (int first = 0; first < task.keys; first += LANES) {
        for (int from = 0; from < size; from += LANES * GROUP, to += LANES) {
            ints rows[LANES];
            for (int i = 0; i < LANES; ++i)
                rows[i] = first + i < task.keys ? load_groups(task.key + (first + i) * task.stride + from) : ints{};
            transpose(rows);
            for (int i = 0; i < LANES; ++i) to[i] = rows[i];
        }
    }
}

template <int size>
void pack_values(const Task& task, ints* to) {
    for (int first = 0; first < task.keys; first += GROUP) {
        const bf16* row = task.value + first * task.stride;
        const bool two = GROUP == 2 && first + 1 < task.keys;
        for (int from = 0; from < size; from += LANES)
            *to++ = join(load(row + from, LANES), two ? load(row + task.stride + from, LANES) : halves{});
    }
}

template <int size>
void pack_query(const bf16* from, int64_t stride, int rows, part* to) {
    for (int r = 0; r < rows; ++r, from += stride)
        for (int c = 0; c < size; c += LANES * GROUP, to += LANES * GROUP) {
            const ints groups = load_groups(from + c);
            std::memcpy(to, &groups, sizeof groups);
        }
}

// to[r, c] = sum over g of left[r, g] * right[g, c], for R rows and C vectors of columns; two of those are
// `across` apart, two groups `along`. A function of its own: its loop needs every register.
template <int R, int C, int across, int along>
__attribute__((noinline)) void multiply(const part* left, int64_t stride, const ints* right, int groups, float* to,
                                        int64_t pitch) {
    floats sums[R][C] = {};
    for (int g = 0; g < groups; ++g, left += GROUP, right += along)
        for (int r = 0; r < R; ++r) {
            const ints each = broadcast(left + r * stride);
            for (int c = 0; c < C; ++c) sums[r][c] = dot(sums[r][c], each, right[c * across]);
        }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(to + r * pitch + c * LANES, sums[r][c]);
}

template <int size, int R>
INLINE void score_rows(const Scratch& scratch, int blocks) {
    constexpr int groups = size / GROUP;
    const int pitch = LANES * blocks;
    const ints* keys = scratch.keys;
    float* to = scratch.scores;
    int left = blocks;
    for (; left >= BLOCKS; left -= BLOCKS, keys += BLOCKS * groups, to += BLOCKS * LANES)
        multiply<R, BLOCKS, groups, 1>(scratch.query, size, keys, groups, to, pitch);
    if constexpr (BLOCKS > 1)
        with_constant<BLOCKS - 1>(left, [&](auto few) {
            multiply<R, decltype(few)::value, groups, 1>(scratch.query, size, keys, groups, to, pitch);
        });
}

// Softmax of one row without its division: writes the weights, returns their sum. The scale comes with
// log2(e) in it.
INLINE float soften(const float* scores, part* to, int keys, int blocks, float scale) {
    const int full = blocks - 1, rest = keys - LANES * full;  // the last block may be partly beyond the keys
    floats top = choose(rest, load(scores + LANES * full, LANES), all(-3.0e38f));
    for (int b = 0; b < full; ++b) top = larger(top, load(scores + LANES * b, LANES));
    const float shift = -scale * largest_of(top);
    const auto weight = [&](int b) { return exp2_coarse(load(scores + LANES * b, LANES) * scale + shift); };
    floats sum = {};
    for (int b = 0; b < full; ++b) {
        const floats x = weight(b);
        sum += x;
        store_parts(to + LANES * b, x);
    }
    const floats last = choose(rest, weight(full), floats{});
    store_parts(to + LANES * full, last);
    return sum_of(sum + last);
}

// The values weighted; over the scores, which nobody needs any more.
template <int size, int R>
INLINE void mix_rows(const Task& task, const Scratch& scratch, int pitch, const float* sums, bf16* out) {
    constexpr int vectors = size / LANES, C = vectors < BLOCKS ? vectors : BLOCKS;
    const int groups = (task.keys + GROUP - 1) / GROUP;
    for (int from = 0; from < vectors; from += C)
        multiply<R, C, 1, vectors>(scratch.chances, pitch, scratch.values + from, groups, scratch.scores + from * LANES,
                                   size);
    for (int r = 0; r < R; ++r) {
        const float share = 1.0f / sums[r];
        for (int c = 0; c < size; c += LANES)
            store(out + r * task.out_stride + c, narrow(load(scratch.scores + r * size + c, LANES) * share), LANES);
    }
}

template <int size, int R>
void attend_rows(const Task& task, const Scratch& scratch, int first) {
    const int blocks = static_cast<int>(vectors(task.keys)), pitch = LANES * blocks;
    pack_query<size>(task.query + first * task.query_stride, task.query_stride, R, scratch.query);
    score_rows<size, R>(scratch, blocks);
    float sums[R];
    for (int r = 0; r < R; ++r)
        sums[r] = soften(scratch.scores + r * pitch, scratch.chances + r * pitch, task.keys, blocks, task.scale);
    mix_rows<size, R>(task, scratch, pitch, sums, task.out + first * task.out_stride);
}

template <int size>
void attend(const Task& task, const Scratch& scratch) {
    pack_keys<size>(task, scratch.keys);
    pack_values<size>(task, scratch.values);
    int row = 0;
    for (; row + ROWS <= task.queries; row += ROWS) attend_rows<size, ROWS>(task, scratch, row);
    with_constant<ROWS - 1>(task.queries - row,
                            [&](auto few) { attend_rows<size, decltype(few)::value>(task, scratch, row); });
}

class Memory {  // one thread's scratch, for the longest pair of the call
  public:
    Memory(int longest, int size)
        : keys_(LANES * vectors(longest)),
          packed_(keys_ * size * sizeof(part)),
          scores_((keys_ > size_t(size) ? keys_ : size) * ROWS * sizeof(float)),
          chances_(keys_ * ROWS * sizeof(part)),
          block_(2 * packed_ + scores_ + chances_ + ROWS * size * sizeof(part)) {}

    bool there() const { return block_.at() != nullptr; }

    Scratch scratch() const {
        char* const at = block_.at();
        return {(ints*)at, (ints*)(at + packed_), (float*)(at + 2 * packed_), (part*)(at + 2 * packed_ + scores_),
                (part*)(at + 2 * packed_ + scores_ + chances_)};
    }

  private:
    const size_t keys_, packed_, scores_, chances_;
    const Block block_;
};

}  // namespace

// Attention of packed bf16 rows.
//   query: [queries, heads * size] rows, query_stride apart; pair i owns query_offsets[i..i + 1]
//   key, value: [tokens, heads * size] rows, stride apart; pair i owns offsets[i..i + 1]
//   out: [queries, heads * size], dense
// Returns 0; 1 if scratch memory could not be allocated, 2 for a head size that is not built.
extern "C" EXPORT int echelon_attention(const bf16* query, int64_t query_stride, const int32_t* query_offsets,
                                        const bf16* key, const bf16* value, int64_t stride, const int32_t* offsets,
                                        int pairs, int heads, int size, bf16* out, int threads) {
    if (size != 64 && size != 32) return 2;
    int longest = 0;
    for (int i = 0; i < pairs; ++i)
        longest = offsets[i + 1] - offsets[i] > longest ? offsets[i + 1] - offsets[i] : longest;
    const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(size));
    int failed = 0;
    Turns turns(static_cast<int64_t>(pairs) * heads);
    on_threads(threads, [&] {
        const Memory memory(longest, size);
        if (!memory.there()) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        for (int64_t index; turns.take(index);) {
            const int64_t pair = index / heads, column = index % heads * size;
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
            size == 64 ? attend<64>(task, memory.scratch()) : attend<32>(task, memory.scratch());
        }
    });
    return failed;
}
