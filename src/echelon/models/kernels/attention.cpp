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

struct Rows {  // of one head
    const bf16* first;
    int64_t stride;  // elements between rows

    const bf16* at(int64_t row) const { return first + row * stride; }
};

struct Task {
    Rows query, key, value;
    Rows key_before, value_before;  // the first `before` keys, which lie elsewhere; key and value go on with
    bf16* out;                      // the next one
    int64_t out_stride;
    int queries, keys, before;
    int reach;    // query r sees the keys r - reach to r + reach; below 0 all
    bool causal;  // the last query sees all keys, and each one before it a key less
    float scale;

    const bf16* key_at(int i) const { return i < before ? key_before.at(i) : key.at(i - before); }
    const bf16* value_at(int i) const { return i < before ? value_before.at(i) : value.at(i - before); }
};

// The keys that a query sees, counted from the first key of some block.
struct Seen {
    int from, to;
};

// The keys that `rows` queries from `first` on see.
INLINE Seen seen_by(const Task& task, int first, int rows) {
    if (task.causal) return {0, task.keys - task.queries + first + rows};
    if (task.reach < 0) return {0, task.keys};
    const int from = first - task.reach, to = first + rows + task.reach;
    return {from > 0 ? from : 0, to < task.keys ? to : task.keys};
}

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
                rows[i] = first + i < task.keys ? load_groups(task.key_at(first + i) + from) : ints{};
            transpose(rows);
            for (int i = 0; i < LANES; ++i) to[i] = rows[i];
        }
    }
}

template <int size>
void pack_values(const Task& task, ints* to) {
    for (int first = 0; first < task.keys; first += GROUP) {
        const bf16* row = task.value_at(first);
        const bf16* next = GROUP == 2 && first + 1 < task.keys ? task.value_at(first + 1) : nullptr;
        for (int from = 0; from < size; from += LANES)
            *to++ = join(load(row + from, LANES), next != nullptr ? load(next + from, LANES) : halves{});
    }
}

template <int size>
void pack_query(const Rows& query, int first, int rows, part* to) {
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < size; c += LANES * GROUP, to += LANES * GROUP) {
            const ints groups = load_groups(query.at(first + r) + c);
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
INLINE void score_rows(const Scratch& scratch, int skipped, int blocks) {
    constexpr int groups = size / GROUP;
    const int pitch = LANES * blocks;
    const ints* keys = scratch.keys + skipped * groups;
    float* to = scratch.scores;
    int left = blocks;
    for (; left >= BLOCKS; left -= BLOCKS, keys += BLOCKS * groups, to += BLOCKS * LANES)
        multiply<R, BLOCKS, groups, 1>(scratch.query, size, keys, groups, to, pitch);
    if constexpr (BLOCKS > 1)
        with_constant<BLOCKS - 1>(left, [&](auto few) {
            multiply<R, decltype(few)::value, groups, 1>(scratch.query, size, keys, groups, to, pitch);
        });
}

// whole(b) for each block of which a row sees all keys, in order with edge(b) for the others.
template <class Edge, class Whole>
INLINE void over_blocks(Seen seen, int blocks, Edge edge, Whole whole) {
    const int from = static_cast<int>(vectors(seen.from)), to = seen.to / LANES;
    int b = 0;
    for (; b < from; ++b) edge(b);
    for (; b < to; ++b) whole(b);
    for (; b < blocks; ++b) edge(b);
}

// The lanes of block b that are seen; `hidden` in the others.
INLINE floats only(Seen seen, int b, floats x, floats hidden) {
    const int from = seen.from - LANES * b, to = seen.to - LANES * b;
    if (from >= LANES || to <= 0) return hidden;
    x = choose(to, x, hidden);
    return from > 0 ? choose(from, hidden, x) : x;
}

// Softmax of one row without its division: writes the weights, returns their sum. The scale comes with
// log2(e) in it.
INLINE float soften(const float* scores, part* to, Seen seen, int blocks, float scale) {
    const auto score = [&](int b) { return load(scores + LANES * b, LANES); };
    floats top = all(-3.0e38f);
    over_blocks(
        seen, blocks, [&](int b) { top = larger(top, only(seen, b, score(b), all(-3.0e38f))); },
        [&](int b) { top = larger(top, score(b)); });
    const float shift = -scale * largest_of(top);
    floats sum = {};
    const auto take = [&](int b, floats x) {
        sum += x;
        store_parts(to + LANES * b, x);
    };
    const auto weight = [&](int b) { return exp2_coarse(score(b) * scale + shift); };
    over_blocks(
        seen, blocks, [&](int b) { take(b, only(seen, b, weight(b), floats{})); },
        [&](int b) { take(b, weight(b)); });
    return sum_of(sum);
}

// The values weighted; over the scores, which nobody needs any more.
template <int size, int R>
INLINE void mix_rows(const Task& task, const Scratch& scratch, int skipped, int keys, int pitch, const float* sums,
                     bf16* out) {
    constexpr int vectors = size / LANES, C = vectors < BLOCKS ? vectors : BLOCKS;
    const int groups = (keys + GROUP - 1) / GROUP;
    const ints* values = scratch.values + skipped * (LANES / GROUP) * vectors;
    for (int from = 0; from < vectors; from += C)
        multiply<R, C, 1, vectors>(scratch.chances, pitch, values + from, groups, scratch.scores + from * LANES, size);
    for (int r = 0; r < R; ++r) {
        const float share = 1.0f / sums[r];
        for (int c = 0; c < size; c += LANES)
            store(out + r * task.out_stride + c, narrow(load(scratch.scores + r * size + c, LANES) * share), LANES);
    }
}

template <int size, int R>
void attend_rows(const Task& task, const Scratch& scratch, int first) {
    const Seen near = seen_by(task, first, R);
    const int skipped = near.from / LANES, start = LANES * skipped;  // blocks that no row sees, and their keys
    const int blocks = static_cast<int>(vectors(near.to - start)), pitch = LANES * blocks;
    pack_query<size>(task.query, first, R, scratch.query);
    score_rows<size, R>(scratch, skipped, blocks);
    float sums[R];
    for (int r = 0; r < R; ++r) {
        const Seen keys = seen_by(task, first + r, 1);
        sums[r] = soften(scratch.scores + r * pitch, scratch.chances + r * pitch, {keys.from - start, keys.to - start},
                         blocks, task.scale);
    }
    mix_rows<size, R>(task, scratch, skipped, near.to - start, pitch, sums, task.out + first * task.out_stride);
}

template <int size>
void pack(const Task& task, const Scratch& scratch) {
    pack_keys<size>(task, scratch.keys);
    pack_values<size>(task, scratch.values);
}

template <int size>
void attend(const Task& task, const Scratch& scratch) {
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

// Call work(turn, scratch) for each turn, on the threads, with scratch for so many keys.
template <class Work>
int take_turns(int64_t count, int longest, int size, int threads, Work work) {
    int failed = 0;
    Turns turns(count);
    on_threads(threads, [&] {
        const Memory memory(longest, size);
        if (!memory.there()) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        for (int64_t turn; turns.take(turn);) work(turn, memory.scratch());
    });
    return failed;
}

float scale_of(int size) { return 1.44269504f / __builtin_sqrtf(static_cast<float>(size)); }

}  // namespace

extern "C" {

// Attention of packed bf16 rows.
//   query: [queries, heads * size] rows, query_stride apart; pair i owns query_offsets[i..i + 1]
//   key, value: [tokens, heads * size] rows, stride apart; pair i owns offsets[i..i + 1]
//   reach: below 0, or how far a query sees on either side: then query r of a pair is its token r
//   out: [queries, heads * size], dense
// Returns 0; 1 if scratch memory could not be allocated, 2 for a head size that is not built.
EXPORT int echelon_attention(const bf16* query, int64_t query_stride, const int32_t* query_offsets, const bf16* key,
                             const bf16* value, int64_t stride, const int32_t* offsets, int pairs, int heads, int size,
                             int reach, bf16* out, int threads) {
    if (size != 64 && size != 32) return 2;
    int longest = 0;
    for (int i = 0; i < pairs; ++i)
        longest = offsets[i + 1] - offsets[i] > longest ? offsets[i + 1] - offsets[i] : longest;
    return take_turns(static_cast<int64_t>(pairs) * heads, longest, size, threads, [=](int64_t turn, Scratch scratch) {
        const int64_t pair = turn / heads, column = turn % heads * size;
        const int64_t first = offsets[pair], row = query_offsets[pair];
        Task task = {};
        task.query = {query + row * query_stride + column, query_stride};
        task.key = {key + first * stride + column, stride};
        task.value = {value + first * stride + column, stride};
        task.out_stride = static_cast<int64_t>(heads) * size;
        task.out = out + row * task.out_stride + column;
        task.queries = query_offsets[pair + 1] - query_offsets[pair];
        task.keys = offsets[pair + 1] - offsets[pair];
        task.reach = reach;
        task.scale = scale_of(size);
        size == 64 ? pack<64>(task, scratch) : pack<32>(task, scratch);
        size == 64 ? attend<64>(task, scratch) : attend<32>(task, scratch);
    });
}

// Causal attention of packed bf16 rows, `group` query heads to a key head. Text i begins with before[i] keys
// from row starts[i] of the prefixes on; its own are the rows offsets[i..i + 1] of key and value. Its queries,
// query_offsets[i..i + 1], are those of its last tokens.
//   query: [queries, heads * group * size], key, value: [tokens, heads * size], each with its stride
//   prefix_key, prefix_value: [prefix tokens, heads * size], dense
//   out: [queries, heads * group * size], dense
// Returns as above.
EXPORT int echelon_causal_attention(const bf16* query, int64_t query_stride, const int32_t* query_offsets,
                                    const bf16* key, int64_t key_stride, const bf16* value, int64_t value_stride,
                                    const int32_t* offsets, const bf16* prefix_key, const bf16* prefix_value,
                                    const int32_t* starts, const int32_t* before, int texts, int heads, int group,
                                    int size, bf16* out, int threads) {
    if (size != 128 && size != 64) return 2;
    int longest = 0;
    for (int i = 0; i < texts; ++i) {
        const int keys = before[i] + offsets[i + 1] - offsets[i];
        longest = keys > longest ? keys : longest;
    }
    return take_turns(static_cast<int64_t>(texts) * heads, longest, size, threads, [=](int64_t turn, Scratch scratch) {
        const int64_t text = turn / heads, head = turn % heads, width = static_cast<int64_t>(heads) * size;
        const int64_t first = offsets[text], row = query_offsets[text], start = starts[text] * width + head * size;
        Task task = {};
        task.key = {key + first * key_stride + head * size, key_stride};
        task.value = {value + first * value_stride + head * size, value_stride};
        task.key_before = {prefix_key + start, width};
        task.value_before = {prefix_value + start, width};
        task.before = before[text];
        task.queries = query_offsets[text + 1] - query_offsets[text];
        task.keys = task.before + offsets[text + 1] - offsets[text];
        task.causal = true;
        task.scale = scale_of(size);
        task.out_stride = width * group;
        size == 128 ? pack<128>(task, scratch) : pack<64>(task, scratch);
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
            task.query = {query + row * query_stride + h * size, query_stride};
            task.out = out + row * task.out_stride + h * size;
            size == 128 ? attend<128>(task, scratch) : attend<64>(task, scratch);
        }
    });
}

}  // extern "C"
