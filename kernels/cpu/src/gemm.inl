// Products of packed weights with a few or many rows, and the expert MLP made of them.
// Included inside an instruction set's namespace, after vec.h.
//
// A packed matrix [N, K] is a sequence of blocks of 16 output rows, each a sequence of 64-wide pieces of the input:
//   int4:    2 groups of (4 x 64 bytes of nibbles), then 2 x 16 float16 scales; 576 bytes
//   int8:    2 groups of (8 x 64 bytes, weight + 128), then 2 x 16 float16 scales; 1088 bytes
//   bf16:    64 inputs as 32 vectors of 16 rows x 2 inputs; 2048 bytes
//   float32: 64 vectors of 16 rows; 4096 bytes
// A nibble vector c of a group holds inputs 8c..8c+3 of each row in its low and 8c+4..8c+7 in its high halves.
// Rows and inputs beyond N and K are zeros. Activations of integer formats are quantised per row and group of 32.
//
// Every (row, output) is one chain of operations in input order, the same for any number of rows in a tile.

constexpr int kPiece = 64;   // inputs in one piece of a block
constexpr int kGroup = 32;   // inputs that share a scale
constexpr int kLanes = 16;   // outputs in one block
constexpr int kMaxRows = 8;  // rows in one tile: their accumulators stay in registers

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
static inline size_t piece_nbytes(int format) {
    switch (format) {
        case kInt4: return 576;
        case kInt8: return 1088;
        case kBf16: return 2048;
        default: return 4096;
    }
}
static inline size_t block_nbytes(int format, int num_inputs) { return ceil_div(num_inputs, kPiece) * piece_nbytes(format); }

// ---- conversions ------------------------------------------------------------------------------------------------------

static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
[[maybe_unused]] static inline float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// ---- activations --------------------------------------------------------------------------------------------------

// Rows in the form that a format's product reads, interleaved by `stride` rows: value (piece of input i, row r) is at
// [i * stride + r]. Integer formats: words of 4 int8, scales, and the correction for the weights' offset, per group.
struct Tile {
    int32_t* words;       // int4, int8: 4 inputs a word; bf16: 2; float32: 1 (bits)
    float* scales;        // [K / 32] per row, integer formats
    int32_t* correction;  // [K / 32] per row, integer formats
};

static inline int inputs_per_word(int format) { return format == kFloat32 ? 1 : format == kBf16 ? 2 : 4; }
static inline bool is_integer(int format) { return format == kInt4 || format == kInt8; }
// 32-bit words that one row of activations takes in a tile
static inline size_t row_words(int format, int num_inputs) {
    const size_t padded = (size_t)ceil_div(num_inputs, kPiece) * kPiece;
    return padded / inputs_per_word(format) + (is_integer(format) ? 2 * (padded / kGroup) : 0);
}
static inline Tile tile_at(int format, int num_inputs, int32_t* memory, int num_rows) {
    const size_t padded = (size_t)ceil_div(num_inputs, kPiece) * kPiece;
    int32_t* scales = memory + padded / inputs_per_word(format) * num_rows;
    return {memory, (float*)scales, scales + padded / kGroup * num_rows};
}

// Quantise one group of 32 values of row r.
static inline void put_group(int format, const float* x, const Tile& tile, int group, int stride, int r) {
    const F16 a = f_load(x), b = f_load(x + 16);
    const float top = f_top(f_max(f_abs(a), f_abs(b)));
    const float scale = top / 127.0f;
    const F16 inverse = f_set1(scale > 0.0f ? 127.0f / top : 0.0f);
    const I16 qa = i_from_f(f_mul(a, inverse)), qb = i_from_f(f_mul(b, inverse));
    int8_t q[32];
    i_store_s8(q, qa);
    i_store_s8(q + 16, qb);
    int32_t* words = tile.words + (size_t)group * 8 * stride + r;
    for (int i = 0; i < 8; ++i) memcpy(words + (size_t)i * stride, q + 4 * i, 4);
    tile.scales[(size_t)group * stride + r] = scale;
    tile.correction[(size_t)group * stride + r] = (i_sum(qa) + i_sum(qb)) * (format == kInt4 ? -8 : -128);
}

// Put row r of x [num_inputs] into a tile of `stride` rows.
static void put_row(int format, const float* x, int num_inputs, const Tile& tile, int stride, int r) {
    const int padded = ceil_div(num_inputs, kPiece) * kPiece;
    if (is_integer(format)) {
        float tail[kGroup];
        for (int k = 0; k < padded; k += kGroup) {
            const float* from = x + k;
            if (k + kGroup > num_inputs) {
                for (int i = 0; i < kGroup; ++i) tail[i] = k + i < num_inputs ? x[k + i] : 0.0f;
                from = tail;
            }
            put_group(format, from, tile, k / kGroup, stride, r);
        }
    } else if (format == kBf16) {
        for (int k = 0; k < padded; k += 2) {
            const uint32_t low = k < num_inputs ? to_bf16(x[k]) : 0, high = k + 1 < num_inputs ? to_bf16(x[k + 1]) : 0;
            tile.words[(size_t)(k / 2) * stride + r] = (int32_t)(low | high << 16);
        }
    } else {
        for (int k = 0; k < padded; ++k) {
            const float value = k < num_inputs ? x[k] : 0.0f;
            memcpy(&tile.words[(size_t)k * stride + r], &value, 4);
        }
    }
}

// ---- products -----------------------------------------------------------------------------------------------------

static inline void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 3); }

// out[b][r] = product of row r of the tile with the 16 outputs of block b, for B blocks that lie `block` bytes apart.
template <int R, int B>
__attribute__((always_inline)) static inline void product_int4(const uint8_t* w, size_t block, int num_pieces, const Tile& x, F16 out[B][R]) {
    F16 sum[B][R];  // not `out`: what is behind a pointer is stored at every step
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) sum[b][r] = f_zero();
    const int32_t* words = x.words;
    const float* scales = x.scales;
    const int32_t* correction = x.correction;
    for (int p = 0; p < num_pieces; ++p, w += 576) {
        for (int g = 0; g < 2; ++g) {
            for (int b = 0; b < B; ++b) {
                const uint8_t* at = w + b * block + g * 256;
                if (g == 0) for (int i = 0; i < 9; ++i) prefetch(w + b * block + 4 * 576 + i * 64);
                I16 acc[R];
                for (int r = 0; r < R; ++r) acc[r] = i_set1(correction[r]);
                for (int c = 0; c < 4; ++c) {
                    const B64 both = b_load(at + c * 64);
                    const B64 low = b_low(both), high = b_high(both);
                    for (int r = 0; r < R; ++r) acc[r] = dot4(acc[r], low, words[2 * c * R + r]);
                    for (int r = 0; r < R; ++r) acc[r] = dot4(acc[r], high, words[(2 * c + 1) * R + r]);
                }
                const F16 step = f_from_half(w + b * block + 512 + g * 32);
                for (int r = 0; r < R; ++r) sum[b][r] = f_fma(f_from_i(acc[r]), f_mul(step, f_set1(scales[r])), sum[b][r]);
            }
            words += 8 * R;
            scales += R;
            correction += R;
        }
    }
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) out[b][r] = sum[b][r];
}

template <int R, int B>
__attribute__((always_inline)) static inline void product_int8(const uint8_t* w, size_t block, int num_pieces, const Tile& x, F16 out[B][R]) {
    F16 sum[B][R];  // not `out`: what is behind a pointer is stored at every step
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) sum[b][r] = f_zero();
    const int32_t* words = x.words;
    const float* scales = x.scales;
    const int32_t* correction = x.correction;
    for (int p = 0; p < num_pieces; ++p, w += 1088) {
        for (int g = 0; g < 2; ++g) {
            for (int b = 0; b < B; ++b) {
                const uint8_t* at = w + b * block + g * 512;
                for (int i = 0; i < 8; ++i) prefetch(at + 3 * 1088 + i * 64);
                I16 acc[R];
                for (int r = 0; r < R; ++r) acc[r] = i_set1(correction[r]);
                for (int c = 0; c < 8; ++c) {
                    const B64 weights = b_load(at + c * 64);
                    for (int r = 0; r < R; ++r) acc[r] = dot4(acc[r], weights, words[c * R + r]);
                }
                const F16 step = f_from_half(w + b * block + 1024 + g * 32);
                for (int r = 0; r < R; ++r) sum[b][r] = f_fma(f_from_i(acc[r]), f_mul(step, f_set1(scales[r])), sum[b][r]);
            }
            words += 8 * R;
            scales += R;
            correction += R;
        }
    }
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) out[b][r] = sum[b][r];
}

#if defined(FG_AVX512)
static inline F16 bf16_dot(F16 acc, const uint8_t* w, int32_t pair) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(pair))};
}
#else
static inline F16 bf16_dot(F16 acc, const uint8_t* w, int32_t pair) {
    uint16_t even[16], odd[16];
    for (int i = 0; i < 16; ++i) {
        memcpy(&even[i], w + 4 * i, 2);
        memcpy(&odd[i], w + 4 * i + 2, 2);
    }
    acc = f_fma(f_from_bf16(even), f_set1(from_bf16((uint16_t)pair)), acc);
    return f_fma(f_from_bf16(odd), f_set1(from_bf16((uint16_t)((uint32_t)pair >> 16))), acc);
}
#endif

// Two chains a row, even and odd vectors, added at the end, so that latency does not bind at one row.
template <int R, int B>
__attribute__((always_inline)) static inline void product_bf16(const uint8_t* w, size_t block, int num_pieces, const Tile& x, F16 out[B][R]) {
    F16 even[B][R], odd[B][R];
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) even[b][r] = odd[b][r] = f_zero();
    const int32_t* words = x.words;
    for (int p = 0; p < num_pieces; ++p, w += 2048)
        for (int v = 0; v < 32; v += 2, words += 2 * R)
            for (int b = 0; b < B; ++b) {
                const uint8_t* at = w + b * block + v * 64;
                prefetch(at + 4096);
                prefetch(at + 4096 + 64);
                for (int r = 0; r < R; ++r) even[b][r] = bf16_dot(even[b][r], at, words[r]);
                for (int r = 0; r < R; ++r) odd[b][r] = bf16_dot(odd[b][r], at + 64, words[R + r]);
            }
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) out[b][r] = f_add(even[b][r], odd[b][r]);
}

template <int R, int B>
__attribute__((always_inline)) static inline void product_float32(const uint8_t* w, size_t block, int num_pieces, const Tile& x, F16 out[B][R]) {
    F16 even[B][R], odd[B][R];
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) even[b][r] = odd[b][r] = f_zero();
    const float* values = (const float*)x.words;
    for (int p = 0; p < num_pieces; ++p, w += 4096)
        for (int k = 0; k < kPiece; k += 2, values += 2 * R)
            for (int b = 0; b < B; ++b) {
                const uint8_t* at = w + b * block + k * 64;
                prefetch(at + 4096);
                prefetch(at + 4096 + 64);
                const F16 even_w = f_load((const float*)at), odd_w = f_load((const float*)(at + 64));
                for (int r = 0; r < R; ++r) even[b][r] = f_fma(even_w, f_set1(values[r]), even[b][r]);
                for (int r = 0; r < R; ++r) odd[b][r] = f_fma(odd_w, f_set1(values[R + r]), odd[b][r]);
            }
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) out[b][r] = f_add(even[b][r], odd[b][r]);
}

template <int R, int B>
__attribute__((always_inline)) static inline void product(int format, const uint8_t* w, size_t block, int num_pieces, const Tile& x, F16 out[B][R]) {
    switch (format) {
        case kInt4: return product_int4<R, B>(w, block, num_pieces, x, out);
        case kInt8: return product_int8<R, B>(w, block, num_pieces, x, out);
        case kBf16: return product_bf16<R, B>(w, block, num_pieces, x, out);
        default: return product_float32<R, B>(w, block, num_pieces, x, out);
    }
}

// Calls body with the number of rows as a compile-time constant.
template <class F>
static inline void with_rows(int num_rows, F&& body) {
    switch (num_rows) {
        case 1: return body(std::integral_constant<int, 1>());
        case 2: return body(std::integral_constant<int, 2>());
        case 3: return body(std::integral_constant<int, 3>());
        case 4: return body(std::integral_constant<int, 4>());
        case 5: return body(std::integral_constant<int, 5>());
        case 6: return body(std::integral_constant<int, 6>());
        case 7: return body(std::integral_constant<int, 7>());
        default: return body(std::integral_constant<int, 8>());
    }
}

// Memory for one kernel call, kept for the next: kernels are called by one thread at a time.
struct Scratch {
    std::vector<int32_t> memory[4];
    int32_t* take(int which, size_t num_words) {
        auto& m = memory[which];
        if (m.size() < num_words + 16) m.resize(num_words + num_words / 4 + 16);
        return (int32_t*)(((uintptr_t)m.data() + 63) & ~(uintptr_t)63);
    }
};
static Scratch scratch;

// Rows of an expert (or of a dense product) cut into tiles of at most kMaxRows, as even as possible.
struct TileSpan {
    int expert, first, num_rows;  // first: index into positions
    size_t offset;                // words into the tile memory
};

static void cut_tiles(int expert, int begin, int end, size_t words, std::vector<TileSpan>& tiles, size_t& offset) {
    const int num = end - begin, num_tiles = ceil_div(num, kMaxRows);
    for (int i = 0; i < num_tiles; ++i) {
        const int first = begin + (int)((int64_t)num * i / num_tiles), last = begin + (int)((int64_t)num * (i + 1) / num_tiles);
        tiles.push_back({expert, first, last - first, offset});
        offset += ((size_t)(last - first) * words + 15) / 16 * 16;
    }
}

static void linear(ThreadPool& pool, const LinearCall& call) {
    const int format = call.format, num_pieces = ceil_div(call.num_inputs, kPiece);
    const size_t block = block_nbytes(format, call.num_inputs);
    static std::vector<TileSpan> tiles;
    tiles.clear();
    size_t total = 0;
    cut_tiles(0, 0, call.num_rows, row_words(format, call.num_inputs), tiles, total);
    int32_t* memory = scratch.take(0, total);
    auto fill = [&](int t) {
        const TileSpan& span = tiles[t];
        const Tile tile = tile_at(format, call.num_inputs, memory + span.offset, span.num_rows);
        for (int r = 0; r < span.num_rows; ++r)
            put_row(format, call.x + (span.first + r) * call.x_stride, call.num_inputs, tile, span.num_rows, r);
    };
    if (call.num_rows <= 2) for (int t = 0; t < (int)tiles.size(); ++t) fill(t);
    else pool.parallel((int)tiles.size(), fill);
    const int num_blocks = ceil_div(call.num_outputs, kLanes);
    const int chunk = std::max(1, std::min(4, num_blocks / (4 * pool.num_threads())));
    pool.parallel(ceil_div(num_blocks, chunk), [&](int task) {
        const int end = std::min(num_blocks, (task + 1) * chunk);
        for (int n = task * chunk; n < end; ++n) {
            const uint8_t* w = call.weight + n * block;
            const int width = std::min(kLanes, call.num_outputs - n * kLanes);
            for (const TileSpan& span : tiles)
                with_rows(span.num_rows, [&](auto rows) {
                    constexpr int R = decltype(rows)::value;
                    F16 out[1][R];
                    product<R, 1>(format, w, block, num_pieces, tile_at(format, call.num_inputs, memory + span.offset, R), out);
                    for (int r = 0; r < R; ++r) {
                        float values[kLanes];
                        f_store(values, out[0][r]);
                        float* to = call.out + (span.first + r) * call.out_stride + n * kLanes;
                        for (int i = 0; i < width; ++i) {
                            const float value = call.bias ? values[i] + call.bias[n * kLanes + i] : values[i];
                            to[i] = call.accumulate ? to[i] + value : value;
                        }
                    }
                });
        }
    });
}

// An expert's record: gate and up interleaved by blocks of 16 units [I / 16][gate, up], then down [H / 16].
static void expert_mlp(ThreadPool& pool, const ExpertCall& call) {
    const int format = call.format, hidden = call.hidden_size, inner = call.intermediate_size;
    const size_t in_block = block_nbytes(format, hidden), out_block = block_nbytes(format, inner);
    const size_t down_at = (size_t)(inner / kLanes) * 2 * in_block;
    const int in_pieces = ceil_div(hidden, kPiece), out_pieces = ceil_div(inner, kPiece);
    static std::vector<TileSpan> tiles;
    static std::vector<int> first_tile;
    static std::vector<size_t> inner_offset;
    tiles.clear();
    first_tile.clear();
    inner_offset.clear();
    size_t total = 0, inner_total = 0;
    const bool one_token = call.num_tokens == 1;
    const size_t in_words = row_words(format, hidden), inner_words = row_words(format, inner);
    for (int e = 0; e < call.num_experts; ++e) {
        first_tile.push_back((int)tiles.size());
        cut_tiles(e, call.row_begin[e], call.row_end[e], in_words, tiles, total);
    }
    first_tile.push_back((int)tiles.size());
    for (TileSpan& span : tiles) {
        if (one_token) span.offset = 0;  // all experts read the same row
        inner_offset.push_back(inner_total);
        inner_total += (span.num_rows * inner_words + 15) / 16 * 16;
    }
    int32_t* memory = scratch.take(0, one_token ? in_words : total);
    int32_t* inner_memory = scratch.take(1, inner_total);
    if (one_token) {
        put_row(format, call.x, hidden, tile_at(format, hidden, memory, 1), 1, 0);
    } else {
        pool.parallel((int)tiles.size(), [&](int t) {
            const TileSpan& span = tiles[t];
            const Tile tile = tile_at(format, hidden, memory + span.offset, span.num_rows);
            for (int r = 0; r < span.num_rows; ++r) {
                const float* x = call.x + (size_t)(call.positions[span.first + r] / call.num_active) * hidden;
                put_row(format, x, hidden, tile, span.num_rows, r);
            }
        });
    }
    if (inner % kPiece)  // the padding of the last piece
        memset(inner_memory, 0, inner_total * 4);

    const int units_per_task = kGroup, num_chunks = inner / units_per_task;
    pool.parallel(call.num_experts * num_chunks, [&](int task) {
        const int e = task / num_chunks, unit = task % num_chunks * units_per_task;
        const uint8_t* w = call.records[e] + (size_t)(unit / kLanes) * 2 * in_block;
        for (int t = first_tile[e]; t < first_tile[e + 1]; ++t)
            with_rows(tiles[t].num_rows, [&](auto rows) {
                constexpr int R = decltype(rows)::value;
                const Tile x = tile_at(format, hidden, memory + tiles[t].offset, R);
                const Tile h = tile_at(format, inner, inner_memory + inner_offset[t], R);
                alignas(64) float values[R][kGroup];
                for (int half = 0; half < 2; ++half) {
                    F16 gate[1][R], up[1][R];
                    product<R, 1>(format, w + (size_t)half * 2 * in_block, in_block, in_pieces, x, gate);
                    product<R, 1>(format, w + (size_t)(half * 2 + 1) * in_block, in_block, in_pieces, x, up);
                    for (int r = 0; r < R; ++r) {
                        const F16 g = gate[0][r];
                        const F16 silu = f_div(g, f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), g))));
                        f_store(values[r] + half * kLanes, f_mul(silu, up[0][r]));
                    }
                }
                for (int r = 0; r < R; ++r) {
                    if (is_integer(format)) {
                        put_group(format, values[r], h, unit / kGroup, R, r);
                    } else if (format == kBf16) {
                        for (int k = 0; k < kGroup; k += 2)
                            h.words[(size_t)((unit + k) / 2) * R + r] =
                                (int32_t)((uint32_t)to_bf16(values[r][k]) | (uint32_t)to_bf16(values[r][k + 1]) << 16);
                    } else {
                        for (int k = 0; k < kGroup; ++k) memcpy(&h.words[(size_t)(unit + k) * R + r], &values[r][k], 4);
                    }
                }
            });
    });

    const int num_blocks = hidden / kLanes, chunk = std::min(4, num_blocks), num_tasks = ceil_div(num_blocks, chunk);
    pool.parallel(call.num_experts * num_tasks, [&](int task) {
        const int e = task / num_tasks, begin = task % num_tasks * chunk, end = std::min(num_blocks, begin + chunk);
        for (int n = begin; n < end; ++n) {
            const uint8_t* w = call.records[e] + down_at + n * out_block;
            for (int t = first_tile[e]; t < first_tile[e + 1]; ++t)
                with_rows(tiles[t].num_rows, [&](auto rows) {
                    constexpr int R = decltype(rows)::value;
                    F16 out[1][R];
                    product<R, 1>(format, w, out_block, out_pieces, tile_at(format, inner, inner_memory + inner_offset[t], R), out);
                    for (int r = 0; r < R; ++r)
                        f_store(call.out + (size_t)call.positions[tiles[t].first + r] * hidden + n * kLanes, out[0][r]);
                });
        }
    });
}
