// Everything between the products: norms, rotation, the paged cache, attention over it, and the fixed-order combine.
// Included inside an instruction set's namespace, after vec.h.
//
// A cache block holds 16 tokens of one kv head: keys [head_dim, 16], so that one vector is one component of 16 tokens and
// no score needs a horizontal sum, and values [16, head_dim]. Both take head_dim * 16 elements, float32 or bf16.
//
// A query row attends in spans of 256 positions that begin at multiples of 256. Every span has its own maximum, sum and
// weighted values, computed in position order up to the row's limit; spans are merged in order (Milakov, Gimelshein 2018).
// So a row is one chain of operations, whatever rows share its tile, its call or its chunk, and whoever computes a span.

constexpr int kTokens = 16;      // in one block of the cache
constexpr int kSpanBlocks = 16;  // blocks in one span
constexpr int kSpan = kSpanBlocks * kTokens;
constexpr int kAhead = 4;  // blocks between what is read and what is prefetched; score_blocks takes no more at a time
#if defined(FG_AVX512)
constexpr int kTileRows = 8;       // query rows that share one read of keys and values
constexpr int kAccumulators = 16;  // vectors kept in registers
#else
constexpr int kTileRows = 4;
constexpr int kAccumulators = 4;
#endif
constexpr int kTaskRows = 64;             // at most: one span's keys and values stay in the L2 cache for all of them
constexpr int kScoreStride = kSpan + 64;  // a row of scores; not a power of two, so that rows do not share cache sets
constexpr int kInline = 16384;            // elements below which a second thread does not pay

// ---- parts of vectors, conversions, memory ----------------------------------------------------------------------------

static inline F16 load_kv(const float* p) { return f_load(p); }
static inline F16 load_kv(const uint16_t* p) { return f_from_bf16(p); }
// The first min(n, 16) of 16 values; the others are 0, and memory beyond is not touched.
template <class T>
static inline F16 load_upto(const T* p, int n) {
    if (n >= 16) return load_kv(p);
    T t[16] = {};
    memcpy(t, p, n * sizeof(T));
    return load_kv(t);
}
static inline void store_upto(float* p, F16 a, int n) {
    if (n >= 16) return f_store(p, a);
    float t[16];
    f_store(t, a);
    memcpy(p, t, n * sizeof(float));
}

static inline void put_kv(float* p, float x) { *p = x; }
static inline void put_kv(uint16_t* p, float x) {  // bf16, to nearest, ties to even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    *p = (uint16_t)((is_nan ? bits | 1u << 22 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float exp_of(float x) {
    float t[16];
    f_store(t, f_exp(f_set1(x)));
    return t[0];
}

// Floats that outlive one task, aligned to 64 bytes; what they held is lost when they grow.
struct Workspace {
    float* data = nullptr;
    size_t size = 0;
    ~Workspace() { operator delete(data, std::align_val_t(64)); }
    float* take(size_t num_floats) {
        if (num_floats > size) {
            operator delete(data, std::align_val_t(64));
            data = nullptr;
            size = num_floats + num_floats / 4;
            data = (float*)operator new(size * sizeof(float), std::align_val_t(64));
        }
        return data;
    }
};
static thread_local Workspace task_space;

// Calls body(row) for each row: on this thread if there is little to do, else a few neighbours to a task.
template <class F>
static inline void for_rows(ThreadPool& pool, int num_rows, size_t row_size, F&& body) {
    if (num_rows * row_size < kInline || num_rows == 1) {
        for (int row = 0; row < num_rows; ++row) body(row);
        return;
    }
    const int chunk = std::max(1, std::min(kTokens, num_rows / (4 * pool.num_threads())));
    pool.parallel((num_rows + chunk - 1) / chunk, [&](int task) {
        const int end = std::min(num_rows, (task + 1) * chunk);
        for (int row = task * chunk; row < end; ++row) body(row);
    });
}

// ---- norms, activations, combine ----------------------------------------------------------------------------------------

// x and out [size] may be the same.
static inline void norm_row(const float* x, const float* weight, float eps, int size, float* out) {
    F16 sums[4] = {f_zero(), f_zero(), f_zero(), f_zero()};
    for (int i = 0; i < size; i += 64)
        for (int j = 0; j < 4 && i + 16 * j < size; ++j) {
            const F16 v = load_upto(x + i + 16 * j, size - i - 16 * j);
            sums[j] = f_fma(v, v, sums[j]);
        }
    const float sum = f_sum(f_add(f_add(sums[0], sums[1]), f_add(sums[2], sums[3])));
    const F16 inverse = f_set1(1.0f / sqrtf(sum / (float)size + eps));
    for (int i = 0; i < size; i += 16)
        store_upto(out + i, f_mul(load_upto(weight + i, size - i), f_mul(load_upto(x + i, size - i), inverse)), size - i);
}

static void rms_norm(ThreadPool& pool, const float* x, const float* weight, float eps, int num_rows, int size, float* out) {
    for_rows(pool, num_rows, size,
             [&](int row) { norm_row(x + (size_t)row * size, weight, eps, size, out + (size_t)row * size); });
}

static void swiglu(ThreadPool& pool, const float* gate_up, int num_rows, int size, float* out) {
    for_rows(pool, num_rows, 2 * (size_t)size, [&](int row) {
        const float *gate = gate_up + 2 * (size_t)row * size, *up = gate + size;
        for (int i = 0; i < size; i += 16) {
            const F16 g = load_upto(gate + i, size - i);
            const F16 silu = f_div(g, f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), g))));
            store_upto(out + (size_t)row * size + i, f_mul(silu, load_upto(up + i, size - i)), size - i);
        }
    });
}

// to [size] += products [num_active, size] times weights, in that order.
static inline void combine_row(const float* products, const float* weights, int num_active, int size, float* to) {
    for (int i = 0; i < size; i += 16) {
        const int n = size - i;
        F16 total = f_mul(load_upto(products + i, n), f_set1(weights[0]));
        for (int k = 1; k < num_active; ++k)
            total = f_fma(load_upto(products + (size_t)k * size + i, n), f_set1(weights[k]), total);
        store_upto(to + i, f_add(load_upto(to + i, n), total), n);
    }
}

// out [num_tokens, size] += each token's products, in routing order.
static void combine(ThreadPool& pool, const float* outputs, const float* weights, int num_tokens, int num_active, int size,
                    float* out) {
    for_rows(pool, num_tokens, (size_t)num_active * size, [&](int token) {
        combine_row(outputs + (size_t)token * num_active * size, weights + (size_t)token * num_active, num_active, size,
                    out + (size_t)token * size);
    });
}

// ---- queries, keys and values -------------------------------------------------------------------------------------------

// out [head_dim] = x rotated in the half-split layout of Llama checkpoints (Su et al. 2021); not in place.
static inline void rotate(const float* x, const float* cos, const float* sin, int head_dim, float* out) {
    const int half = head_dim / 2;
    for (int i = 0; i < half; i += 16) {
        const int n = half - i;
        const F16 low = load_upto(x + i, n), high = load_upto(x + half + i, n);
        const F16 low_sin = f_mul(high, load_upto(sin + i, n)), high_sin = f_mul(low, load_upto(sin + half + i, n));
        store_upto(out + i, f_sub(f_mul(low, load_upto(cos + i, n)), low_sin), n);
        store_upto(out + half + i, f_fma(high, load_upto(cos + half + i, n), high_sin), n);
    }
}

template <class T>
static void prepare_row(const QkvCall& call, int row) {
    const int dim = call.head_dim, heads = call.num_heads, kv_heads = call.num_kv_heads;
    const size_t q_size = (size_t)heads * dim, kv_size = (size_t)kv_heads * dim, width = q_size + 2 * kv_size;
    float* query = task_space.take(width + dim);
    float *key = query + q_size, *value = key + kv_size, *rotated = value + kv_size;
    memcpy(query, call.qkv + row * width, width * sizeof(float));
    if (call.norm == 2) {
        norm_row(query, call.q_norm, call.eps, (int)q_size, query);
        norm_row(key, call.k_norm, call.eps, (int)kv_size, key);
    }
    if (call.clip > 0.0f) {
        const F16 low = f_set1(-call.clip), high = f_set1(call.clip);
        for (size_t i = 0; i < width; i += 16) {
            const int n = (int)std::min<size_t>(16, width - i);
            store_upto(query + i, f_min(f_max(load_upto(query + i, n), low), high), n);
        }
    }
    const float *cos = call.cos + (size_t)call.positions[row] * dim, *sin = call.sin + (size_t)call.positions[row] * dim;
    for (int h = 0; h < heads; ++h) {
        if (call.norm == 1) norm_row(query + h * dim, call.q_norm, call.eps, dim, query + h * dim);
        rotate(query + h * dim, cos, sin, dim, call.query + row * q_size + h * dim);
    }
    const size_t block = call.slots[row] / kTokens, offset = call.slots[row] % kTokens, block_size = (size_t)dim * kTokens;
    for (int h = 0; h < kv_heads; ++h) {
        if (call.norm == 1) norm_row(key + h * dim, call.k_norm, call.eps, dim, key + h * dim);
        rotate(key + h * dim, cos, sin, dim, rotated);
        T* keys = (T*)call.keys + (block * kv_heads + h) * block_size + offset;
        T* values = (T*)call.values + (block * kv_heads + h) * block_size + offset * dim;
        for (int d = 0; d < dim; ++d) put_kv(keys + (size_t)d * kTokens, rotated[d]);
        for (int d = 0; d < dim; ++d) put_kv(values + d, value[h * dim + d]);
    }
}

// Rows of one call never share a slot, so any thread may write any row.
static void prepare_qkv(ThreadPool& pool, const QkvCall& call) {
    const size_t width = (size_t)(call.num_heads + 2 * call.num_kv_heads) * call.head_dim;
    for_rows(pool, call.num_rows, width,
             [&](int row) { call.kv_is_bf16 ? prepare_row<uint16_t>(call, row) : prepare_row<float>(call, row); });
}

// ---- attention ----------------------------------------------------------------------------------------------------------

// What a row has seen of one span, or of several: weighted values [padded head_dim], then the maximum, then the sum.
static inline int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }
static inline size_t record_size(int head_dim) { return (size_t)padded_dim(head_dim) + 16; }

// scores [R][kScoreStride] of the blocks keys[0..B] with R queries, interleaved [head_dim][R]; keys[kAhead..] are prefetched.
template <int R, int B, class T>
static void score_blocks(const T* const* keys, const float* queries, int head_dim, float scale, float* scores) {
    constexpr int step = 4 / sizeof(T);  // components in one cache line
    const T* at[B];
    const T* ahead[B];
    F16 acc[B][R];
    for (int b = 0; b < B; ++b) {
        at[b] = keys[b];
        ahead[b] = keys[kAhead + b];
        for (int r = 0; r < R; ++r) acc[b][r] = f_zero();
    }
    for (int d = 0; d < head_dim; d += step) {  // head_dim is even
        for (int b = 0; b < B; ++b) __builtin_prefetch(ahead[b] + (size_t)d * kTokens, 0, 3);
        for (int s = 0; s < step; ++s) {
            F16 key[B];
            for (int b = 0; b < B; ++b) key[b] = load_kv(at[b] + (size_t)(d + s) * kTokens);
            for (int r = 0; r < R; ++r) {
                const F16 q = f_set1(queries[(d + s) * R + r]);
                for (int b = 0; b < B; ++b) acc[b][r] = f_fma(key[b], q, acc[b][r]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) f_store(scores + r * kScoreStride + b * kTokens, f_mul(acc[b][r], f_set1(scale)));
}

// Scores of one row, num_positions of them, become weights; what lies beyond them has no influence.
static inline void soften(float* scores, int num_positions, float* maximum, float* sum) {
    const int num_vectors = (num_positions + 15) / 16;
    for (int i = num_positions; i < num_vectors * 16; ++i) scores[i] = -INFINITY;
    F16 top = f_load(scores);
    for (int i = 1; i < num_vectors; ++i) top = f_max(top, f_load(scores + i * 16));
    *maximum = f_top(top);
    const F16 shift = f_set1(*maximum);
    for (int i = 0; i < num_vectors; ++i) f_store(scores + i * 16, f_exp(f_sub(f_load(scores + i * 16), shift)));
    for (int i = num_positions; i < num_vectors * 16; ++i) scores[i] = 0.0f;
    F16 total = f_zero();
    for (int i = 0; i < num_vectors; ++i) total = f_add(total, f_load(scores + i * 16));
    *sum = f_sum(total);
}

// records += weights [R][kScoreStride] of positions begin..end of the span, times components first..first + 16 D of their
// values. One loop over positions, not one over blocks and one inside: so the compiler keeps all sums in registers.
template <int R, int D, class T>
static void add_values(const T* const* values, size_t stride, int first, const float* weights, unsigned begin, unsigned end,
                       float* records, size_t record_stride) {
    F16 acc[R][D];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < D; ++c) acc[r][c] = f_load(records + r * record_stride + first + c * 16);
    for (unsigned p = begin; p < end; ++p) {
        const size_t at = p % kTokens * stride + first;
        const T *now = values[p / kTokens] + at, *ahead = values[p / kTokens + kAhead] + at;
        F16 v[D];
        for (int c = 0; c < D; ++c) v[c] = load_kv(now + c * 16);
        for (size_t i = 0; i < D * 16; i += 64 / sizeof(T)) __builtin_prefetch(ahead + i, 0, 3);
        for (int r = 0; r < R; ++r) {
            const F16 w = f_set1(weights[r * kScoreStride + p]);
            for (int c = 0; c < D; ++c) acc[r][c] = f_fma(v[c], w, acc[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < D; ++c) f_store(records + r * record_stride + first + c * 16, acc[r][c]);
}

// All components, as many at a time as registers hold.
template <int R, class T>
static inline void add_all_values(const T* const* values, int stride, const float* weights, int begin, int end, float* records,
                                  size_t record_stride) {
    constexpr int most = kAccumulators / R;
    for (int first = 0; first < stride;) {
        const int left = stride - first;
        if (most >= 8 && left >= 128) {
            add_values<R, (most >= 8 ? 8 : 1)>(values, stride, first, weights, begin, end, records, record_stride);
            first += 128;
        } else if (most >= 4 && left >= 64) {
            add_values<R, (most >= 4 ? 4 : 1)>(values, stride, first, weights, begin, end, records, record_stride);
            first += 64;
        } else if (most >= 2 && left >= 32) {
            add_values<R, (most >= 2 ? 2 : 1)>(values, stride, first, weights, begin, end, records, record_stride);
            first += 32;
        } else {
            add_values<R, 1>(values, stride, first, weights, begin, end, records, record_stride);
            first += 16;
        }
    }
}

// One span of R rows: counts [R] are the positions that each sees of it, in ascending order, the last at least 1.
// keys, values: its blocks, then the 2 kAhead and kAhead that are read next; rows of values are whole vectors.
template <int R, class T>
static void attend_tile(const AttentionCall& call, const float* queries, const T* const* keys, const T* const* values,
                        const int* counts, float* scores, float* records, size_t record_stride) {
    constexpr int B = kAccumulators / R >= 4 ? 4 : kAccumulators / R >= 2 ? 2 : 1;
    const int dim = call.head_dim, padded = padded_dim(dim), num_blocks = (counts[R - 1] + kTokens - 1) / kTokens;
    for (int b = 0; b < num_blocks; b += B)
        score_blocks<R, B>(keys + b, queries, dim, call.scale, scores + b * kTokens);
    for (int r = 0; r < R; ++r) {
        float* record = records + r * record_stride;
        memset(record, 0, padded * sizeof(float));
        if (counts[r] > 0) soften(scores + r * kScoreStride, counts[r], record + padded, record + padded + 1);
    }
    // positions that all rows see, then the few that only later rows see: no row meets a value beyond its limit
    const int shared = std::max(0, counts[0]);
    add_all_values<R>(values, padded, scores, 0, shared, records, record_stride);
    for (int r = 0; r < R; ++r)
        if (counts[r] > shared)
            add_all_values<1>(values, padded, scores + r * kScoreStride, shared, counts[r], records + r * record_stride, 0);
}

// into = into and then part, which sees later positions.
static inline void merge(float* into, const float* part, int padded) {
    const float top = std::max(into[padded], part[padded]);
    const float a = exp_of(into[padded] - top), b = exp_of(part[padded] - top);
    into[padded] = top;
    into[padded + 1] = into[padded + 1] * a + part[padded + 1] * b;
    for (int i = 0; i < padded; i += 16)
        f_store(into + i, f_fma(f_load(into + i), f_set1(a), f_mul(f_load(part + i), f_set1(b))));
}

// Some rows of one sequence and kv head, over some spans. Rows count (token, head of the group), the head fastest.
struct AttentionItem {
    int seq, kv_head, first, num_rows, first_span, end_span;
    float* partial;  // records [num_rows, spans of all positions], or null: the item sees all spans and is done
};

struct AttentionRows {
    int group, before;  // query heads of a kv head; tokens before the sequence's rows
    int limit(int row) const { return before + row / group + 1; }  // positions that a row sees
    int num_spans(int end) const { return (limit(end - 1) + kSpan - 1) / kSpan; }  // that rows below end see
};
static inline AttentionRows rows_of(const AttentionCall& call, int seq) {
    return {call.num_heads / call.num_kv_heads, call.context[seq] - (call.row_begin[seq + 1] - call.row_begin[seq])};
}
static inline size_t head_of(const AttentionCall& call, const AttentionItem& item, int row) {  // into query and out
    const int group = call.num_heads / call.num_kv_heads;
    return ((size_t)(call.row_begin[item.seq] + row / group) * call.num_heads + item.kv_head * group + row % group) *
           call.head_dim;
}

static inline void finish(const float* record, int head_dim, float* out) {
    const F16 sum = f_set1(record[padded_dim(head_dim) + 1]);
    for (int i = 0; i < head_dim; i += 16) store_upto(out + i, f_div(f_load(record + i), sum), head_dim - i);
}

template <class F>
static inline void with_tile(int num_rows, F&& body) {
    switch (num_rows) {
        case 1: return body(std::integral_constant<int, 1>());
        case 2: return body(std::integral_constant<int, 2>());
        case 3: return body(std::integral_constant<int, 3>());
        case 4: return body(std::integral_constant<int, 4>());
#if defined(FG_AVX512)
        case 5: return body(std::integral_constant<int, 5>());
        case 6: return body(std::integral_constant<int, 6>());
        case 7: return body(std::integral_constant<int, 7>());
        case 8: return body(std::integral_constant<int, 8>());
#endif
    }
}

// One span of an item, tile by tile; the rows' queries are interleaved within their tile.
template <class T>
static void attend_span(const AttentionCall& call, const AttentionItem& item, int span, const float* queries,
                        const T* const* keys, const T* const* values, float* scores, float* parts, float* states) {
    const AttentionRows rows = rows_of(call, item.seq);
    const size_t record = record_size(call.head_dim);
    for (int tile = 0; tile < item.num_rows; tile += kTileRows) {
        const int num_rows = std::min(kTileRows, item.num_rows - tile);
        int counts[kTileRows];
        for (int r = 0; r < num_rows; ++r) counts[r] = std::min(kSpan, rows.limit(item.first + tile + r) - span * kSpan);
        if (counts[num_rows - 1] <= 0) continue;
        float* out = span == 0 ? states + tile * record : parts;
        size_t stride = record;
        if (item.partial) {
            stride = rows.num_spans(item.first + item.num_rows) * record;
            out = item.partial + tile * stride + span * record;
        }
        with_tile(num_rows, [&](auto num_rows_in_tile) {
            constexpr int R = decltype(num_rows_in_tile)::value;
            attend_tile<R>(call, queries + (size_t)tile * call.head_dim, keys, values, counts, scores, out, stride);
        });
        if (out != parts) continue;
        for (int r = 0; r < num_rows; ++r)
            if (counts[r] > 0) merge(states + (tile + r) * record, parts + r * record, padded_dim(call.head_dim));
    }
}

template <class T>
static void attend(const AttentionCall& call, const AttentionItem& item) {
    const int dim = call.head_dim, padded = padded_dim(dim), end = item.first + item.num_rows;
    const size_t record = record_size(dim), block_size = (size_t)dim * kTokens, copy_size = (size_t)padded * kTokens;
    // several tiles share one conversion from bf16; rows of values that are not whole vectors are padded
    const bool copy = padded != dim || (sizeof(T) == 2 && item.num_rows > kTileRows);
    float* scores = task_space.take(kTileRows * (kScoreStride + record) + kTaskRows * (record + padded) +
                                    2 * kSpanBlocks * copy_size);
    float *parts = scores + kTileRows * kScoreStride, *states = parts + kTileRows * record;
    float *queries = states + kTaskRows * record, *copies = queries + kTaskRows * padded;
    for (int tile = 0; tile < item.num_rows; tile += kTileRows)
        with_tile(std::min(kTileRows, item.num_rows - tile), [&](auto num_rows_in_tile) {
            constexpr int R = decltype(num_rows_in_tile)::value;
            const float* from[R];
            for (int r = 0; r < R; ++r) from[r] = call.query + head_of(call, item, item.first + tile + r);
            float* to = queries + (size_t)tile * dim;
            for (int d = 0; d < dim; ++d)
                for (int r = 0; r < R; ++r) to[d * R + r] = from[r][d];
        });
    const int32_t* blocks = call.blocks + call.block_begin[item.seq];
    const int num_blocks = (rows_of(call, item.seq).limit(end - 1) + kTokens - 1) / kTokens;
    auto at = [&](const void* cache, int32_t block) {
        return (const T*)cache + ((size_t)block * call.num_kv_heads + item.kv_head) * block_size;
    };
    for (int span = item.first_span; span < item.end_span; ++span) {
        const int first = span * kSpanBlocks, num = std::min(kSpanBlocks, num_blocks - first);
        const T *keys[kSpanBlocks + 2 * kAhead], *values[kSpanBlocks + kAhead];
        for (int b = 0; b < num; ++b) {
            keys[b] = at(call.keys, blocks[first + b]);
            values[b] = at(call.values, blocks[first + b]);
        }
        for (int b = 0; b < 2 * kAhead; ++b) keys[num + b] = values[std::min(b, num - 1)];
        for (int b = 0; b < kAhead; ++b)
            values[num + b] = first + num + b < num_blocks ? at(call.keys, blocks[first + num + b]) : values[num - 1];
        if (!copy) {
            attend_span(call, item, span, queries, keys, values, scores, parts, states);
            continue;
        }
        const float *key_copies[kSpanBlocks + 2 * kAhead], *value_copies[kSpanBlocks + kAhead];
        for (int b = 0; b < num; ++b) {
            float *key = copies + 2 * b * copy_size, *value = key + copy_size;
            for (int d = 0; d < dim; ++d) f_store(key + d * kTokens, load_kv(keys[b] + d * kTokens));
            for (int t = 0; t < kTokens; ++t)
                for (int d = 0; d < dim; d += 16) f_store(value + t * padded + d, load_upto(values[b] + t * dim + d, dim - d));
            key_copies[b] = key;
            value_copies[b] = value;
        }
        for (int b = 0; b < 2 * kAhead; ++b) key_copies[num + b] = value_copies[num - 1];
        for (int b = 0; b < kAhead; ++b) value_copies[num + b] = value_copies[num - 1];
        attend_span(call, item, span, queries, key_copies, value_copies, scores, parts, states);
    }
    if (item.partial) return;
    for (int r = 0; r < item.num_rows; ++r)
        finish(states + r * record, dim, call.out + head_of(call, item, item.first + r));
}

// Tasks are (sequence, kv head, up to 64 rows), the heaviest sequences first; when those are too few for the threads, a
// task becomes several, each with some of the spans, which are merged when all are done.
static void attention(ThreadPool& pool, const AttentionCall& call) {
    static std::vector<AttentionItem> items, whole;
    static Workspace partials;
    const int group = call.num_heads / call.num_kv_heads, threads = pool.num_threads();
    auto num_items = [&](int task_rows) {
        int64_t num = 0;
        for (int s = 0; s < call.num_seqs; ++s)
            num += ((int64_t)(call.row_begin[s + 1] - call.row_begin[s]) * group + task_rows - 1) / task_rows;
        return num * call.num_kv_heads;
    };
    int task_rows = kTaskRows;
    while (task_rows > kTileRows && num_items(task_rows) < 4 * threads) task_rows /= 2;

    items.clear();
    for (int s = 0; s < call.num_seqs; ++s) {
        const int num_rows = (call.row_begin[s + 1] - call.row_begin[s]) * group;
        for (int h = 0; h < call.num_kv_heads; ++h)
            for (int end = num_rows; end > 0; end -= task_rows) {  // later rows see more
                const int first = std::max(0, end - task_rows);
                items.push_back({s, h, first, end - first, 0, rows_of(call, s).num_spans(end), nullptr});
            }
    }
    // the weight of a sequence, not of an item: tasks that share keys and values stay together
    auto weight = [&](int s) {
        return (int64_t)std::min((call.row_begin[s + 1] - call.row_begin[s]) * group, task_rows) * call.context[s];
    };
    std::stable_sort(items.begin(), items.end(),
                     [&](const AttentionItem& a, const AttentionItem& b) { return weight(a.seq) > weight(b.seq); });

    whole.clear();
    const int num_whole = (int)items.size();
    if (threads > 1 && num_whole > 0 && num_whole < 2 * threads) {
        whole.swap(items);
        const size_t record = record_size(call.head_dim);
        size_t total = 0;
        for (const AttentionItem& item : whole) total += item.num_rows * item.end_span * record;
        float* memory = partials.take(total);
        for (AttentionItem& item : whole) {
            item.partial = memory;
            memory += item.num_rows * item.end_span * record;
            const int num_parts = std::min(item.end_span, (4 * threads + num_whole - 1) / num_whole);
            for (int part = 0; part < num_parts; ++part) {
                AttentionItem piece = item;
                piece.first_span = (int)((int64_t)item.end_span * part / num_parts);
                piece.end_span = (int)((int64_t)item.end_span * (part + 1) / num_parts);
                items.push_back(piece);
            }
        }
    }
    pool.parallel((int)items.size(), [&](int task) {
        call.kv_is_bf16 ? attend<uint16_t>(call, items[task]) : attend<float>(call, items[task]);
    });
    pool.parallel((int)whole.size(), [&](int task) {
        const AttentionItem& item = whole[task];
        const size_t record = record_size(call.head_dim);
        const AttentionRows rows = rows_of(call, item.seq);
        for (int r = 0; r < item.num_rows; ++r) {
            float* state = item.partial + r * item.end_span * record;
            for (int span = 1; span * kSpan < rows.limit(item.first + r); ++span)
                merge(state, state + span * record, padded_dim(call.head_dim));
            finish(state, call.head_dim, call.out + head_of(call, item, item.first + r));
        }
    });
}
