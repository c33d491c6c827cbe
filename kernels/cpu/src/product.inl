// Products of packed weights with a few or many rows. Included inside an instruction set's namespace, after vec.h.
//
// A packed matrix [N, K] is a sequence of blocks of 16 output rows, each a sequence of 64-wide pieces of the input:
//   int4:    2 groups of (4 x 64 bytes of nibbles), 2 x 16 steps, 16 x 2 bases; 576 bytes
//   int8:    16 x 64 bytes, weight + 128; 1024 bytes
//   bf16:    64 inputs as 32 vectors of 16 rows x 2 inputs; 2048 bytes
//   float32: 64 vectors of 16 rows; 4096 bytes
// A nibble vector c of a group of 32 holds inputs 8c..8c+3 of each row in its low and 8c+4..8c+7 in its high halves.
// Integer formats: 4 pieces are a span of 256 inputs, which share a bf16 scale [16]; all scales lie after the block's
// pieces. A nibble u of a group stands for (u * step + base - 128) * scale, and u * step + base is a byte: so an int4
// matrix is an int8 matrix in fewer bits, and may be computed as either. Rows and inputs beyond N and K are zeros.
//
// Activations of integer formats are quantised per row and span, to 8 bits; where a dense layer's span has an outlier
// that would leave too few of them to the rest, to 16, as a high and a low byte. A span's sum of products with either is
// a whole number below 2^24, so it is the same float however it is come by; those are then added in order. In the other
// formats every (row, output) is one chain of operations in input order. Hence the same bits for any number of rows,
// whichever path takes them.

constexpr int kPiece = 64;       // inputs in one piece of a block
constexpr int kGroup = 32;       // inputs that share a step and a base
constexpr int kSpanPieces = 4;   // pieces that share a scale
constexpr int kLanes = 16;       // outputs in one block
constexpr int kTile = 16;        // rows at most that lie together, piece by piece
constexpr int kPair = 2;         // blocks that are multiplied together
constexpr int kTaskBlocks = 32;  // blocks at most in one task: each begins by waiting for memory
constexpr int kFewBlocks = 4;    // blocks at least, where there are as many
#if defined(FG_AMX)
constexpr int kStreams = 4;      // blocks that a few rows read in turn: CPUs with AMX were seen to read four faster than one,
#else
constexpr int kStreams = 1;      // and one without AMX one faster than four
#endif
#if defined(FG_AVX512)
constexpr int kInt4Blocks = 2;   // int4 blocks that share what is loaded of a row
#else
constexpr int kInt4Blocks = 1;
#endif
constexpr int kInt4BlocksRows = 4;  // from so many rows on
constexpr int kMostStreams = std::max(kStreams, kInt4Blocks);
constexpr float kLow = 1.0f / 256.0f;  // a low byte's worth beside a high one's
constexpr float kOutlier = 6.0f; // times the root mean square: a span with more than that gets low bytes
#if defined(FG_AVX512)
constexpr int kFewRows = 8;      // rows whose sums of every kind stay in registers
constexpr int kManyRows = 8;     // rows whose innermost sums, of a pair of blocks, stay in registers
constexpr int kBf16Blocks = 2;   // blocks and rows whose two sums stay in registers
constexpr int kBf16Rows = 6;
#else
constexpr int kFewRows = 2;
constexpr int kManyRows = 4;
constexpr int kBf16Blocks = 1;
constexpr int kBf16Rows = 2;
#endif

// Unrolled before GCC decides what to keep in registers, which otherwise are written to the stack and read back.
#define FG_UNROLL _Pragma("GCC unroll 16")

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
static inline bool is_integer(int format) { return format == kInt4 || format == kInt8; }

// A packed matrix' sizes.
struct Shape {
    int format, num_inputs, num_pieces, num_spans;
    bool has_low;  // activations may have low bytes
    size_t piece_nbytes, block_nbytes;

    Shape(int format, int num_inputs, bool is_dense = false)
        : format(format), num_inputs(num_inputs), has_low(is_dense && is_integer(format)) {
        num_pieces = ceil_div(num_inputs, kPiece);
        num_spans = is_integer(format) ? ceil_div(num_pieces, kSpanPieces) : 0;
        piece_nbytes = format == kInt4 ? 576 : format == kInt8 ? 1024 : format == kBf16 ? 2048 : 4096;
        block_nbytes = (num_pieces * piece_nbytes + num_spans * 32 + 63) / 64 * 64;
    }
    const uint8_t* scales(const uint8_t* block) const { return block + num_pieces * piece_nbytes; }
    // 64-byte chunks of activations in a piece: 64 int8, 32 bf16 or 16 float32
    int num_chunks() const { return num_pieces * (format == kFloat32 ? 4 : format == kBf16 ? 2 : 1); }
    int num_pairs() const { return format == kInt4 ? num_pieces : 0; }
    size_t tile_nbytes(int num_rows) const {
        const size_t row = (size_t)num_chunks() * 64 + num_spans * 8 + num_pairs() * 4;
        const size_t low = has_low ? row - num_spans * 3 : 0;  // no scales, but a byte that tells whether it is there
        return (num_rows * (row + low) + 63) / 64 * 64;
    }
};

// ---- activations --------------------------------------------------------------------------------------------------

// Up to 16 rows of activations as products read them: chunk i of row r at [i * num_rows + r].
struct Tile {
    int num_rows;
    uint8_t* chunks;      // [num_chunks, num_rows, 64]
    float* scales;        // [num_spans, num_rows], integer formats
    int32_t* correction;  // [num_spans, num_rows] -128 times the span's sum, integer formats
    int32_t* pairs;       // [num_pieces, num_rows] sums of a piece's two groups, 16 bits each, int4
    // of shapes that have low bytes, a 256th as large:
    uint8_t* low_chunks;      // as chunks; zeros in rows without
    int32_t* low_correction;  // as correction
    int32_t* low_pairs;       // as pairs
    uint8_t* low_is_there;    // [num_spans, num_rows]

    Tile(const Shape& shape, uint8_t* memory, int num_rows) : num_rows(num_rows), chunks(memory) {
        low_chunks = memory + (size_t)shape.num_chunks() * 64 * num_rows;
        scales = (float*)(low_chunks + (shape.has_low ? (size_t)shape.num_chunks() * 64 * num_rows : 0));
        correction = (int32_t*)scales + shape.num_spans * num_rows;
        pairs = correction + shape.num_spans * num_rows;
        low_correction = pairs + shape.num_pairs() * num_rows;
        low_pairs = low_correction + shape.num_spans * num_rows;
        low_is_there = (uint8_t*)(low_pairs + shape.num_pairs() * num_rows);
    }
    bool span_has_low(const Shape& shape, int span) const {
        if (!shape.has_low) return false;
        const uint8_t* rows = low_is_there + span * num_rows;
        return std::any_of(rows, rows + num_rows, [](uint8_t is_there) { return is_there != 0; });
    }
};

// x[k..k + 15], zeros beyond num_inputs
static inline F16 load_inputs(const float* x, int k, int num_inputs) {
    if (k + kLanes <= num_inputs) return f_load(x + k);
    float t[kLanes] = {};
    for (int i = 0; k + i < num_inputs; ++i) t[i] = x[k + i];
    return f_load(t);
}

static inline int32_t as_pair(const int32_t sums[2]) { return (int32_t)((uint32_t)sums[0] & 0xffff) | sums[1] * 65536; }

static void put_span(const Shape& shape, const float* x, const Tile& tile, int span, int r) {
    const int first = span * kSpanPieces, last = std::min(shape.num_pieces, first + kSpanPieces);
    F16 values[kSpanPieces * 4];
    F16 top = f_zero(), squares = f_zero();
    const int num = (last - first) * 4;
    for (int i = 0; i < num; ++i) {
        values[i] = load_inputs(x, first * kPiece + i * kLanes, shape.num_inputs);
        top = f_max(top, f_abs(values[i]));
        if (shape.has_low) squares = f_fma(values[i], values[i], squares);
    }
    const float largest = f_top(top), scale = largest / 127.0f;
    const int width = std::min(shape.num_inputs, last * kPiece) - first * kPiece;
    const bool has_low = shape.has_low && largest * largest * width > kOutlier * kOutlier * f_sum(squares);
    const F16 inverse = f_set1(scale > 0.0f ? (has_low ? 127.0f * 256.0f : 127.0f) / largest : 0.0f);
    int32_t sum = 0, low_sum = 0;
    for (int p = first; p < last; ++p) {
        const size_t at = ((size_t)p * tile.num_rows + r) * 64;
        int32_t sums[2], low_sums[2];
        for (int g = 0; g < 2; ++g) {
            I16 group = i_set1(0), low_group = i_set1(0);
            for (int i = 0; i < 2; ++i) {
                I16 q = i_from_f(f_mul(values[(p - first) * 4 + g * 2 + i], inverse));
                const size_t to = at + g * kGroup + i * kLanes;
                if (has_low) {
                    const I16 high = i_round_shift8(q), low = i_sub(q, i_shift8(high));
                    i_store_s8((int8_t*)tile.low_chunks + to, low);
                    low_group = i_add(low_group, low);
                    q = high;
                }
                i_store_s8((int8_t*)tile.chunks + to, q);
                group = i_add(group, q);
            }
            sums[g] = i_sum(group);
            low_sums[g] = has_low ? i_sum(low_group) : 0;
        }
        if (shape.has_low && !has_low) memset(tile.low_chunks + at, 0, 64);
        sum += sums[0] + sums[1];
        low_sum += low_sums[0] + low_sums[1];
        if (shape.format != kInt4) continue;
        tile.pairs[p * tile.num_rows + r] = as_pair(sums);
        if (shape.has_low) tile.low_pairs[p * tile.num_rows + r] = as_pair(low_sums);
    }
    const int at = span * tile.num_rows + r;
    tile.scales[at] = scale;
    tile.correction[at] = -128 * sum;
    if (shape.has_low) {
        tile.low_correction[at] = -128 * low_sum;
        tile.low_is_there[at] = has_low;
    }
}

// Put x [num_inputs] into a tile as its row r.
static void put_row(const Shape& shape, const float* x, const Tile& tile, int r) {
    if (is_integer(shape.format)) {
        for (int s = 0; s < shape.num_spans; ++s) put_span(shape, x, tile, s, r);
        return;
    }
    const bool is_bf16 = shape.format == kBf16;
    for (int i = 0; i < shape.num_chunks(); ++i) {
        uint8_t* chunk = tile.chunks + ((size_t)i * tile.num_rows + r) * 64;
        if (is_bf16) {
            f_store_bf16(chunk, load_inputs(x, i * 32, shape.num_inputs));
            f_store_bf16(chunk + 32, load_inputs(x, i * 32 + kLanes, shape.num_inputs));
        } else {
            f_store((float*)chunk, load_inputs(x, i * kLanes, shape.num_inputs));
        }
    }
}

// Copy the only row of a tile to row r of another; of shapes without low bytes.
static void copy_row(const Shape& shape, const Tile& from, const Tile& to, int r) {
    for (int i = 0; i < shape.num_chunks(); ++i) memcpy(to.chunks + ((size_t)i * to.num_rows + r) * 64, from.chunks + i * 64, 64);
    for (int s = 0; s < shape.num_spans; ++s) {
        to.scales[s * to.num_rows + r] = from.scales[s];
        to.correction[s * to.num_rows + r] = from.correction[s];
    }
    if (shape.format == kInt4)
        for (int p = 0; p < shape.num_pieces; ++p) to.pairs[p * to.num_rows + r] = from.pairs[p];
}

// A run of at most 16 rows. `at`: where its tile begins in the tile memory, in bytes.
struct RowSpan {
    int first, num_rows;
    size_t at;
};
// Results of product(): [blocks, num_rows, 16], rows counted from the first run's first.
struct Values {
    float* memory;
    int num_rows;

    float* at(int block, int row) const { return memory + ((size_t)block * num_rows + row) * kLanes; }
};

// ---- products of a few rows -----------------------------------------------------------------------------------------

static inline void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 3); }
static inline void prefetch_l2(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
static inline int32_t word_at(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return word;
}

// Each takes R rows of a tile from `first` on.

// One span of an int4 block with R rows of chunks.
template <int R>
static inline void sum_span_int4(const uint8_t* w, int num_pieces, const uint8_t* chunk, const int32_t* pairs, int num_rows,
                                 const int32_t* correction, F16 out[R]) {
    I16 base[R];
    FG_UNROLL for (int r = 0; r < R; ++r) {
        base[r] = i_set1(correction[r]);
        out[r] = f_zero();
    }
    for (int p = 0; p < num_pieces; ++p, w += 576, chunk += (size_t)num_rows * 64, pairs += num_rows) {
        for (int i = 0; i < 9; ++i) prefetch(w + 4 * 576 + i * 64);
        const I16 bases = i_pairs_from_u8(w + 544);
        FG_UNROLL for (int r = 0; r < R; ++r) base[r] = dot2(base[r], bases, pairs[r]);
        for (int g = 0; g < 2; ++g) {
            I16 low_sum[R], high_sum[R];
            FG_UNROLL for (int r = 0; r < R; ++r) low_sum[r] = high_sum[r] = i_set1(0);
            for (int c = 0; c < 4; ++c) {
                const B64 both = b_load(w + g * 256 + c * 64);
                const B64 low = b_low(both), high = b_high_part(both);
                const uint8_t* at = chunk + g * 32 + c * 8;
                FG_UNROLL for (int r = 0; r < R; ++r) low_sum[r] = dot4_small(low_sum[r], low, word_at(at + r * 64));
                FG_UNROLL for (int r = 0; r < R; ++r) high_sum[r] = dot4_high_part(high_sum[r], high, word_at(at + r * 64 + 4));
            }
            const F16 step = f_from_i(i_from_u8(w + 512 + g * 16));
            FG_UNROLL for (int r = 0; r < R; ++r) out[r] = f_fma(f_from_i(i_add(low_sum[r], i_of_high_parts(high_sum[r]))), step, out[r]);
        }
    }
    FG_UNROLL for (int r = 0; r < R; ++r) out[r] = f_add(out[r], f_from_i(base[r]));
}

#if defined(FG_AVX512)
// The same of B blocks, `block_nbytes` apart: what is loaded of a row serves all of them, since loads are what limits some
// rows. Nibbles are multiplied as the high halves of bytes, so that a group needs one sum, 16 times too large; which is why
// a step here is a 16th. `ahead`: what comes after these blocks, in the order in which it lies in memory, is asked for
// meanwhile, since hardware that looks ahead was seen to do so less well with several blocks in turn.
template <int R, int B>
static inline void sum_span_of_blocks_int4(const uint8_t* w, size_t block_nbytes, int num_pieces, const uint8_t* chunk,
                                           const int32_t* pairs, int num_rows, const int32_t* correction, const uint8_t* ahead,
                                           F16 out[B][R]) {
    FG_UNROLL for (int b = 0; b < B; ++b)
        FG_UNROLL for (int r = 0; r < R; ++r) out[b][r] = f_zero();
    const uint8_t* const end = w + num_pieces * 576;
    for (; w < end; w += 576, chunk += (size_t)num_rows * 64) {
        for (int g = 0; g < 2; ++g) {
            I16 sum[B][R];
            FG_UNROLL for (int b = 0; b < B; ++b)
                FG_UNROLL for (int r = 0; r < R; ++r) sum[b][r] = i_set1(0);
            FG_UNROLL for (int c = 0; c < 4; ++c) {
                const uint8_t* at = chunk + g * 32 + c * 8;
                B64 low[B], high[B];
                FG_UNROLL for (int b = 0; b < B; ++b) {
                    const uint8_t* from = w + b * block_nbytes + g * 256 + c * 64;
                    prefetch(from + 2 * 576);
                    prefetch_l2(ahead);
                    ahead += 64;
                    const B64 both = b_load(from);
                    low[b] = b_low_as_high_part(both);
                    high[b] = b_high_part(both);
                }
                FG_UNROLL for (int r = 0; r < R; ++r) {
                    const int32_t inputs = word_at(at + r * 64);
                    FG_UNROLL for (int b = 0; b < B; ++b) sum[b][r] = dot4(sum[b][r], low[b], inputs);
                }
                FG_UNROLL for (int r = 0; r < R; ++r) {
                    const int32_t inputs = word_at(at + r * 64 + 4);
                    FG_UNROLL for (int b = 0; b < B; ++b) sum[b][r] = dot4(sum[b][r], high[b], inputs);
                }
            }
            FG_UNROLL for (int b = 0; b < B; ++b) {
                if (g == 0) {
                    prefetch(w + b * block_nbytes + 2 * 576 + 512);
                    prefetch_l2(ahead);
                    ahead += 64;
                }
                const F16 step = f_mul(f_from_i(i_from_u8(w + b * block_nbytes + 512 + g * 16)), f_set1(1.0f / 16.0f));
                FG_UNROLL for (int r = 0; r < R; ++r) out[b][r] = f_fma(f_from_i(sum[b][r]), step, out[b][r]);
            }
        }
    }
    I16 base[B][R];
    FG_UNROLL for (int b = 0; b < B; ++b)
        FG_UNROLL for (int r = 0; r < R; ++r) base[b][r] = i_set1(correction[r]);
    for (w = end - num_pieces * 576; w < end; w += 576, pairs += num_rows)
        FG_UNROLL for (int b = 0; b < B; ++b) {
            const I16 bases = i_pairs_from_u8(w + b * block_nbytes + 544);
            FG_UNROLL for (int r = 0; r < R; ++r) base[b][r] = dot2(base[b][r], bases, pairs[r]);
        }
    FG_UNROLL for (int b = 0; b < B; ++b)
        FG_UNROLL for (int r = 0; r < R; ++r) out[b][r] = f_add(out[b][r], f_from_i(base[b][r]));
}
#endif

// One span of an int8 block with R rows of chunks: two chains, so that latency does not bind at one row.
template <int R>
static inline void sum_span_int8(const uint8_t* w, int num_pieces, const uint8_t* chunk, int num_rows, const int32_t* correction,
                                 F16 out[R]) {
    I16 even[R], odd[R];
    FG_UNROLL for (int r = 0; r < R; ++r) {
        even[r] = i_set1(correction[r]);
        odd[r] = i_set1(0);
    }
    for (int p = 0; p < num_pieces; ++p, w += 1024, chunk += (size_t)num_rows * 64)
        for (int c = 0; c < 16; c += 2) {
            prefetch(w + 3072 + c * 64);
            prefetch(w + 3072 + c * 64 + 64);
            const B64 even_w = b_load(w + c * 64), odd_w = b_load(w + c * 64 + 64);
            FG_UNROLL for (int r = 0; r < R; ++r) even[r] = dot4(even[r], even_w, word_at(chunk + r * 64 + c * 4));
            FG_UNROLL for (int r = 0; r < R; ++r) odd[r] = dot4(odd[r], odd_w, word_at(chunk + r * 64 + c * 4 + 4));
        }
    FG_UNROLL for (int r = 0; r < R; ++r) out[r] = f_from_i(i_add(even[r], odd[r]));
}

// Of int4 and int8, for B blocks from w on, a span of each in turn; results go to row first_row and on of `out`.
template <int R, int B, int Format>
static inline void product_integer(const Shape& shape, const uint8_t* w, const Tile& x, int first, const Values& out, int first_row) {
    constexpr int piece_nbytes = Format == kInt4 ? 576 : 1024;
    constexpr int together = Format == kInt4 && R >= kInt4BlocksRows ? std::min(B, kInt4Blocks) : 1;
    F16 total[B][R];
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) total[b][r] = f_zero();
    for (int s = 0; s < shape.num_spans; ++s) {
        const int p = s * kSpanPieces, num_pieces = std::min(kSpanPieces, shape.num_pieces - p), at = s * x.num_rows + first;
        const size_t chunks_at = ((size_t)p * x.num_rows + first) * 64;
        auto add = [&](int begin, const uint8_t* chunks, const int32_t* pairs, const int32_t* correction, float worth) {
            const uint8_t *block = w + begin * shape.block_nbytes, *span = block + p * piece_nbytes;
            F16 sums[together][R];
#if defined(FG_AVX512)
            if constexpr (together > 1) {
                const uint8_t* ahead = w + B * shape.block_nbytes + (p * B + begin * num_pieces) * piece_nbytes;
                sum_span_of_blocks_int4<R, together>(span, shape.block_nbytes, num_pieces, chunks + chunks_at,
                                                     pairs + p * x.num_rows + first, x.num_rows, correction + at, ahead, sums);
            } else
#endif
            if constexpr (Format == kInt4)
                sum_span_int4<R>(span, num_pieces, chunks + chunks_at, pairs + p * x.num_rows + first, x.num_rows, correction + at, sums[0]);
            else
                sum_span_int8<R>(span, num_pieces, chunks + chunks_at, x.num_rows, correction + at, sums[0]);
            FG_UNROLL for (int b = 0; b < together; ++b) {
                const F16 factor = f_mul(f_from_bf16(shape.scales(block + b * shape.block_nbytes) + s * 32), f_set1(worth));
                FG_UNROLL for (int r = 0; r < R; ++r)
                    total[begin + b][r] = f_fma(sums[b][r], f_mul(factor, f_set1(x.scales[at + r])), total[begin + b][r]);
            }
        };
        const bool has_low = x.span_has_low(shape, s);
        for (int b = 0; b < B; b += together) {
            add(b, x.chunks, x.pairs, x.correction, 1.0f);
            if (has_low) add(b, x.low_chunks, x.low_pairs, x.low_correction, kLow);
        }
    }
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) f_store(out.at(b, first_row + r), total[b][r]);
}

#if !defined(FG_AMX)
#if defined(FG_AVX512)
static inline F16 bf16_dot(F16 acc, const uint8_t* w, int32_t pair) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(_mm512_loadu_si512(w)), "v"(_mm512_set1_epi32(pair)));
    return acc;
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

// Of B blocks from w on; results go to block `block` on, row `row` on. Two chains a row, even and odd vectors, added at the
// end, so that latency does not bind at one row.
template <int R, int B>
static inline void product_bf16(const Shape& shape, const uint8_t* w, const Tile& x, int first, const Values& values, int block,
                                int row) {
    const size_t stride = (size_t)x.num_rows * 64;
    const uint8_t* chunk = x.chunks + first * 64;
    F16 even[B][R], odd[B][R];
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) even[b][r] = odd[b][r] = f_zero();
    for (int i = 0; i < shape.num_chunks(); ++i, w += 1024, chunk += stride) {
        for (int r = 0; r < R; ++r) prefetch(chunk + 2 * stride + r * 64);
        for (int v = 0; v < 16; v += 2) {
            const uint8_t* at[B];
            for (int b = 0; b < B; ++b) {
                at[b] = w + b * shape.block_nbytes + v * 64;
                prefetch(at[b] + 4096);
                prefetch(at[b] + 4096 + 64);
            }
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < B; ++b) even[b][r] = bf16_dot(even[b][r], at[b], word_at(chunk + r * 64 + v * 4));
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < B; ++b) odd[b][r] = bf16_dot(odd[b][r], at[b] + 64, word_at(chunk + r * 64 + v * 4 + 4));
        }
    }
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) f_store(values.at(block + b, row + r), f_add(even[b][r], odd[b][r]));
}
#endif

template <int R>
static inline void product_float32(const Shape& shape, const uint8_t* w, const Tile& x, int first, const Values& values, int block,
                                   int row) {
    const size_t stride = (size_t)x.num_rows * 64;
    const uint8_t* chunk = x.chunks + first * 64;
    F16 even[R], odd[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = f_zero();
    for (int i = 0; i < shape.num_chunks(); ++i, w += 1024, chunk += stride)
        for (int k = 0; k < 16; k += 2) {
            prefetch(w + 4096 + k * 64);
            prefetch(w + 4096 + k * 64 + 64);
            const F16 even_w = f_load((const float*)(w + k * 64)), odd_w = f_load((const float*)(w + k * 64 + 64));
            for (int r = 0; r < R; ++r) even[r] = f_fma(even_w, f_set1(((const float*)(chunk + r * 64))[k]), even[r]);
            for (int r = 0; r < R; ++r) odd[r] = f_fma(odd_w, f_set1(((const float*)(chunk + r * 64))[k + 1]), odd[r]);
        }
    for (int r = 0; r < R; ++r) f_store(values.at(block, row + r), f_add(even[r], odd[r]));
}

// Calls body with a number of rows of 1..Max as a compile-time constant.
template <int Max, class F>
static inline void with_rows(int num_rows, F&& body) {
    if constexpr (Max > 1) {
        if (num_rows < Max) return with_rows<Max - 1>(num_rows, body);
    }
    body(std::integral_constant<int, Max>());
}

#if !defined(FG_AMX)
// Of all rows of a tile, results from row first_row on.
static inline void product_bf16_of_tile(const Shape& shape, const uint8_t* w, int num_blocks, const Tile& x, const Values& values,
                                        int first_row) {
    for (int b = 0; b < num_blocks; b += kBf16Blocks)
        for (int first = 0; first < x.num_rows; first += kBf16Rows)
            with_rows<kBf16Rows>(x.num_rows - first, [&](auto rows) {
                constexpr int R = decltype(rows)::value;
                const uint8_t* block = w + b * shape.block_nbytes;
                if (b + kBf16Blocks <= num_blocks)
                    return product_bf16<R, kBf16Blocks>(shape, block, x, first, values, b, first_row + first);
                product_bf16<R, 1>(shape, block, x, first, values, b, first_row + first);
            });
}
#endif

// ---- any number of rows ---------------------------------------------------------------------------------------------

constexpr size_t kExpandAhead = 192;  // bytes of a later piece that are prefetched as one expands

// The bytes u * step + base of one span of an int4 block, as an int8 block has them: [pieces, 16, 64].
static inline void expand_int4(const uint8_t* w, int num_pieces, uint8_t* out) {
    for (int p = 0; p < num_pieces; ++p, w += 576, out += 1024) {
        for (size_t i = 0; i < kExpandAhead; i += 64) prefetch(w + 4 * 576 + i);
        const I16 bases = i_pairs_from_u8(w + 544);
        for (int g = 0; g < 2; ++g) {
            const I16 step = i_spread2(i_from_u8(w + 512 + g * 16));
            const I16 base = i_spread4(g ? i_high_of_pairs(bases) : i_low_of_pairs(bases));
            for (int c = 0; c < 4; ++c) {
                const B64 both = b_load(w + g * 256 + c * 64);
                b_store(out + g * 512 + c * 128, b_affine(b_low(both), step, base));
                b_store(out + g * 512 + c * 128 + 64, b_affine(b_high(both), step, base));
            }
        }
    }
}

// What is added to the sums of a tile's rows for one span: its high or its low bytes.
struct SpanOfRows {
    const uint8_t* chunks;      // [pieces, num_rows, 64]
    const float* scales;        // [num_rows]
    const int32_t* correction;  // [num_rows]

    SpanOfRows(const Tile& x, int span, bool low)
        : chunks((low ? x.low_chunks : x.chunks) + (size_t)span * kSpanPieces * x.num_rows * 64),
          scales(x.scales + span * x.num_rows),
          correction((low ? x.low_correction : x.correction) + span * x.num_rows) {}
};

// The weights of one span, as int8 blocks.
struct SpanOfWeights {
    const uint8_t* packed[kPair];
    const uint8_t* blocks[kPair];  // [pieces, 16, 64]
    const uint8_t* next[kPair];    // packed, of the span that comes after this one
    F16 factors[kPair];
    int num_blocks, span, num_pieces;
};

#if defined(FG_AMX)
#include "amx.inl"
#else
struct TileScope {
    ~TileScope() {}
};

// Adds one span of inputs to the results, at `row` and on, of R rows of a tile from `first` on with B blocks from `block`
// on. `next` are the rows that come after these: they are in the L2 cache, and asked for in time.
template <int R, int B>
static inline void add_span(const SpanOfWeights& w, int block, const SpanOfRows& x, int num_rows, int first, const Values& values,
                            int row, bool is_first, const uint8_t* next) {
    const size_t stride = (size_t)num_rows * 64;
    const uint8_t* chunk = x.chunks + first * 64;
    I16 acc[B][R];
    FG_UNROLL for (int b = 0; b < B; ++b)
        FG_UNROLL for (int r = 0; r < R; ++r) acc[b][r] = i_set1(x.correction[first + r]);
    for (int p = 0; p < w.num_pieces; ++p, chunk += stride, next += stride) {
        FG_UNROLL for (int r = 0; r < R; ++r) prefetch(next + r * 64);
        for (int c = 0; c < 16; ++c) {
            B64 weights[B];
            FG_UNROLL for (int b = 0; b < B; ++b) weights[b] = b_load(w.blocks[block + b] + p * 1024 + c * 64);
            FG_UNROLL for (int r = 0; r < R; ++r) {
                const int32_t inputs = word_at(chunk + r * 64 + c * 4);
                FG_UNROLL for (int b = 0; b < B; ++b) acc[b][r] = dot4(acc[b][r], weights[b], inputs);
            }
        }
    }
    FG_UNROLL for (int b = 0; b < B; ++b)
        FG_UNROLL for (int r = 0; r < R; ++r) {
            const F16 scaled = f_mul(w.factors[block + b], f_set1(x.scales[first + r]));
            float* to = values.at(block + b, row + r);
            f_store(to, f_fma(f_from_i(acc[b][r]), scaled, is_first ? f_zero() : f_load(to)));
        }
}

// Adds spans to the sums in `values`, which the first one begins.
class SpanAdder {
public:
    SpanAdder(const Shape& shape, const RowSpan* runs, uint8_t* memory, const Values& values)
        : shape_(shape), first_row_(runs[0].first), memory_(memory), values_(values) {}

    void add(const SpanOfWeights& weights, const RowSpan* runs, int num_runs, bool low) {
        const size_t span_nbytes = kSpanPieces * shape_.piece_nbytes;
        // the next span's weights, a part of them before each tile
        const size_t part = (span_nbytes * kManyRows / std::max(kManyRows, values_.num_rows) + 63) / 64 * 64;
        size_t ahead = 0;
        const bool is_first = weights.span == 0 && !low;
        for (int t = 0; t < num_runs; ++t) {
            const int num_rows = runs[t].num_rows;
            const SpanOfRows x(Tile(shape_, memory_ + runs[t].at, num_rows), weights.span, low);
            const int row = runs[t].first - first_row_;
            for (int r = 0; r < num_rows; r += kManyRows) {
                for (const size_t end = std::min(span_nbytes, ahead + part); ahead < end; ahead += 64)
                    for (int b = 0; b < weights.num_blocks; ++b) prefetch(weights.next[b] + ahead);
                const uint8_t* next = x.chunks + (r + kManyRows) * 64;
                if (r + kManyRows >= num_rows) {
                    const RowSpan& run = runs[t + 1 < num_runs ? t + 1 : 0];
                    const int span = t + 1 < num_runs ? weights.span : (weights.span + 1) % shape_.num_spans;
                    next = SpanOfRows(Tile(shape_, memory_ + run.at, run.num_rows), span, low).chunks;
                }
                with_rows<kManyRows>(num_rows - r, [&](auto rows) {
                    constexpr int R = decltype(rows)::value;
#if defined(FG_AVX512)
                    if (weights.num_blocks == kPair) return add_span<R, kPair>(weights, 0, x, num_rows, r, values_, row + r, is_first, next);
#endif
                    for (int b = 0; b < weights.num_blocks; ++b) add_span<R, 1>(weights, b, x, num_rows, r, values_, row + r, is_first, next);
                });
            }
        }
    }

private:
    const Shape& shape_;
    int first_row_;
    uint8_t* memory_;
    Values values_;
};
#endif

// Span by span over all rows, so that a span's weights are expanded once and stay in the L1 cache for all of them. Takes
// one or two blocks.
static void product_by_spans(const Shape& shape, const uint8_t* w, int num_blocks, const RowSpan* runs, int num_runs,
                             uint8_t* memory, const Values& values) {
    alignas(64) uint8_t expanded[kPair][kSpanPieces * 1024];
    SpanAdder adder(shape, runs, memory, values);
    for (int s = 0; s < shape.num_spans; ++s) {
        SpanOfWeights weights;
        weights.num_blocks = num_blocks;
        weights.span = s;
        weights.num_pieces = std::min(kSpanPieces, shape.num_pieces - s * kSpanPieces);
        for (int b = 0; b < num_blocks; ++b) {
            const uint8_t* block = w + b * shape.block_nbytes;
            weights.blocks[b] = weights.packed[b] = block + (size_t)s * kSpanPieces * shape.piece_nbytes;
            if (shape.format == kInt4) {
                expand_int4(weights.blocks[b], weights.num_pieces, expanded[b]);
                weights.blocks[b] = expanded[b];
            }
            weights.factors[b] = f_from_bf16(shape.scales(block) + s * 32);
            const uint8_t* next_block = block + kPair * shape.block_nbytes;
            weights.next[b] = s + 1 < shape.num_spans ? weights.packed[b] + kSpanPieces * shape.piece_nbytes : next_block;
            prefetch(shape.scales(next_block) + s * 32);
        }
        adder.add(weights, runs, num_runs, false);
        if (!shape.has_low) continue;
        for (int b = 0; b < num_blocks; ++b) weights.factors[b] = f_mul(weights.factors[b], f_set1(kLow));
        for (int t = 0; t < num_runs; ++t) {
            if (!Tile(shape, memory + runs[t].at, runs[t].num_rows).span_has_low(shape, s)) continue;
            adder.add(weights, runs + t, 1, true);
        }
    }
}

// Rows from which on going span by span pays.
static inline int by_spans_from([[maybe_unused]] int format) {
#if defined(FG_AMX)
    return format == kInt4 ? 6 : 8;
#elif defined(FG_AVX512)
    return kFewRows + 1;
#else
    return format == kInt4 ? 2 * kFewRows : kFewRows + 1;
#endif
}

// Products of the blocks from w on with all rows of the runs.
static void product(const Shape& shape, const uint8_t* w, int num_blocks, const RowSpan* runs, int num_runs, uint8_t* memory,
                    const Values& values) {
    if (num_runs == 0) return;
    auto by_pairs = [&](auto multiply) {
        for (int b = 0; b < num_blocks; b += kPair)
            multiply(shape, w + b * shape.block_nbytes, std::min(kPair, num_blocks - b), runs, num_runs, memory,
                     Values{values.at(b, 0), values.num_rows});
    };
    if (is_integer(shape.format) && values.num_rows >= by_spans_from(shape.format)) return by_pairs(product_by_spans);
#if defined(FG_AMX)
    if (shape.format == kBf16) return by_pairs(amx_product_bf16);
#endif
    // all rows with a few blocks before the next ones, so that weights are read once
    const int num_together = shape.format == kBf16 ? kBf16Blocks : shape.format == kInt4 ? kMostStreams : kStreams;
    for (int b = 0; b < num_blocks; b += num_together) {
        const uint8_t* block = w + b * shape.block_nbytes;
        const int num = std::min(num_together, num_blocks - b);
        const Values out{values.at(b, 0), values.num_rows};
        for (int t = 0; t < num_runs; ++t) {
            const int num_rows = runs[t].num_rows;
            const Tile x(shape, memory + runs[t].at, num_rows);
            const int first_row = runs[t].first - runs[0].first;
#if !defined(FG_AMX)
            if (shape.format == kBf16) {
                product_bf16_of_tile(shape, block, num, x, out, first_row);
                continue;
            }
#endif
            for (int first = 0; first < num_rows; first += kFewRows)
                with_rows<kFewRows>(num_rows - first, [&](auto rows) {
                    constexpr int R = decltype(rows)::value;
                    const int row = first_row + first;
                    constexpr int int4_streams = R >= kInt4BlocksRows ? kMostStreams : kStreams;
                    if (shape.format == kInt4 && num == int4_streams)
                        return product_integer<R, int4_streams, kInt4>(shape, block, x, first, out, row);
                    if (shape.format == kInt8 && num == kStreams)
                        return product_integer<R, kStreams, kInt8>(shape, block, x, first, out, row);
                    for (int i = 0; i < num; ++i) {
                        const uint8_t* one = block + i * shape.block_nbytes;
                        const Values to{out.at(i, 0), out.num_rows};
                        if (shape.format == kInt4) product_integer<R, 1, kInt4>(shape, one, x, first, to, row);
                        else if (shape.format == kInt8) product_integer<R, 1, kInt8>(shape, one, x, first, to, row);
                        else product_float32<R>(shape, one, x, first, to, 0, row);
                    }
                });
        }
    }
}
