// Products on AMX tiles: two blocks of 16 outputs by two runs of rows at a time. Included by product.inl.

// Tiles 0..3: results [run * 2 + block]; 4, 5: rows of the two runs; 6, 7: weights of the two blocks.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_nbytes[16] = {};
    uint8_t num_rows[16] = {};

    constexpr TileConfig() = default;
    constexpr TileConfig(int rows0, int rows1) {
        for (int i = 0; i < 8; ++i) {
            row_nbytes[i] = 64;
            num_rows[i] = (uint8_t)(i >= 6 ? 16 : i == 4 || i < 2 ? rows0 : rows1);
        }
    }
};

// All there are: to read one that was just written, byte by byte, takes as long as a small product.
struct TileConfigs {
    TileConfig of[kTile][kTile];

    constexpr TileConfigs() {
        for (int i = 0; i < kTile; ++i)
            for (int j = 0; j < kTile; ++j) of[i][j] = TileConfig(i + 1, j + 1);
    }
};
static constexpr TileConfigs tile_configs;
static thread_local int tile_rows0, tile_rows1;  // as configured, or 0

static inline void configure_tiles(int rows0, int rows1) {
    rows1 = std::max(rows1, 1);
    if (rows0 == tile_rows0 && rows1 == tile_rows1) return;
    tile_rows0 = rows0;
    tile_rows1 = rows1;
    asm volatile("ldtilecfg %0" ::"m"(tile_configs.of[rows0 - 1][rows1 - 1]) : "memory");
}

// Around a thread's products: its tiles are released at the end.
struct TileScope {
    ~TileScope() {
        if (tile_rows0) _tile_release();
        tile_rows0 = 0;
    }
};

// Adds spans to the sums in `values`, which the first one begins, two runs of rows at a time. What one call computes is added while the next one's
// tile products are under way: they take long, and leave the vector units free.
class SpanAdder {
public:
    SpanAdder(const Shape& shape, const RowSpan* runs, uint8_t* memory, const Values& values)
        : shape_(shape), first_row_(runs[0].first), memory_(memory), values_(values) {}
    ~SpanAdder() { finish(); }

    void add(const SpanOfWeights& weights, const RowSpan* runs, int num_runs, bool low) {
        asm volatile("" ::: "memory");  // tile loads do not tell the compiler that they read memory
        const uint8_t *w0 = weights.blocks[0], *w1 = weights.blocks[weights.num_blocks - 1];
        for (int t = 0; t < num_runs; t += 2) {
            const int rows0 = runs[t].num_rows, rows1 = t + 1 < num_runs ? runs[t + 1].num_rows : 0;
            configure_tiles(rows0, rows1);
            Pending now;
            now.num_blocks = weights.num_blocks;
            for (int b = 0; b < kPair; ++b) now.factors[b] = weights.factors[b];
            for (int i = 0; i < 2; ++i) now.runs[i] = i == 0 || rows1 ? &runs[t + i] : nullptr;
            now.span = weights.span;
            now.low = low;
            now.is_first = weights.span == 0 && !low;
            const uint8_t* x0 = rows_of(runs[t], now).chunks;
            _tile_zero(0);
            _tile_zero(1);
            if (rows1) {
                const uint8_t* x1 = rows_of(runs[t + 1], now).chunks;
                _tile_zero(2);
                _tile_zero(3);
                const uint8_t* next0 = t + 2 < num_runs ? rows_of(runs[t + 2], now).chunks : x1;
                const uint8_t* next1 = t + 3 < num_runs ? rows_of(runs[t + 3], now).chunks : x1;
                for (int p = 0; p < weights.num_pieces; ++p) {
                    if (t == 0) prefetch_piece(weights, kSpanPieces + p);
                    for (int r = 0; r < rows1; ++r) prefetch(next0 + ((size_t)p * rows1 + r) * 64);
                    _tile_loadd(4, x0 + (size_t)p * rows0 * 64, 64);
                    _tile_loadd(6, w0 + p * 1024, 64);
                    _tile_dpbsud(0, 4, 6);
                    _tile_loadd(7, w1 + p * 1024, 64);
                    _tile_dpbsud(1, 4, 7);
                    for (int r = 0; r < rows1; ++r) prefetch(next1 + ((size_t)p * rows1 + r) * 64);
                    _tile_loadd(5, x1 + (size_t)p * rows1 * 64, 64);
                    _tile_dpbsud(2, 5, 6);
                    _tile_dpbsud(3, 5, 7);
                }
            } else {
                for (int p = 0; p < weights.num_pieces; ++p) {
                    if (t == 0) prefetch_piece(weights, kSpanPieces + p);
                    _tile_loadd(4, x0 + (size_t)p * rows0 * 64, 64);
                    _tile_loadd(6, w0 + p * 1024, 64);
                    _tile_dpbsud(0, 4, 6);
                    _tile_loadd(7, w1 + p * 1024, 64);
                    _tile_dpbsud(1, 4, 7);
                }
            }
            finish();
            pending_ = now;
            which_ ^= 1;
            _tile_stored(0, sums_[which_][0], 64);
            _tile_stored(1, sums_[which_][1], 64);
            if (rows1) {
                _tile_stored(2, sums_[which_][2], 64);
                _tile_stored(3, sums_[which_][3], 64);
            }
        }
    }

private:
    struct Pending {
        const RowSpan* runs[2] = {nullptr, nullptr};
        F16 factors[kPair];
        int num_blocks, span;
        bool low, is_first;
    };

    SpanOfRows rows_of(const RowSpan& run, const Pending& p) const {
        return SpanOfRows(Tile(shape_, memory_ + run.at, run.num_rows), p.span, p.low);
    }

    // Spread over the products: memory takes only a few requests at once. int4's are in part asked for as they expand.
    void prefetch_piece(const SpanOfWeights& weights, int piece) const {
        const size_t at = piece * shape_.piece_nbytes;
        for (size_t i = shape_.format == kInt4 ? kExpandAhead : 0; i < shape_.piece_nbytes; i += 64)
            for (int b = 0; b < weights.num_blocks; ++b) prefetch(weights.packed[b] + at + i);
    }

    void finish() {
        for (int i = 0; i < 2 && pending_.runs[i]; ++i) {
            const RowSpan& run = *pending_.runs[i];
            const SpanOfRows x = rows_of(run, pending_);
            for (int b = 0; b < pending_.num_blocks; ++b) {
                float* to = values_.at(b, run.first - first_row_);
                const int32_t* from = sums_[which_][i * 2 + b];
                const F16 factor = pending_.factors[b];
                for (int r = 0; r < run.num_rows; ++r, to += kLanes, from += kLanes) {
                    const I16 sum = i_add(i_load(from), i_set1(x.correction[r]));
                    const F16 total = pending_.is_first ? f_zero() : f_load(to);
                    f_store(to, f_fma(f_from_i(sum), f_mul(factor, f_set1(x.scales[r])), total));
                }
            }
        }
    }

    const Shape& shape_;
    int first_row_;
    uint8_t* memory_;
    Values values_;
    Pending pending_;
    int which_ = 0;
    alignas(64) int32_t sums_[2][4][kTile * kLanes];  // [which][run * 2 + block]
};

// A result is one chain of tile products, 32 inputs each, in input order.
static void amx_product_bf16(const Shape& shape, const uint8_t* w, int num_blocks, const RowSpan* runs, int num_runs,
                             uint8_t* memory, const Values& values) {
    asm volatile("" ::: "memory");  // tile loads do not tell the compiler that they read memory
    const int begin = runs[0].first, num_chunks = shape.num_chunks();
    const uint8_t *w0 = w, *w1 = w + (num_blocks - 1) * shape.block_nbytes;
    alignas(64) float unused[kTile * kLanes];
    for (int t = 0; t < num_runs; t += 2) {
        const int rows0 = runs[t].num_rows, rows1 = t + 1 < num_runs ? runs[t + 1].num_rows : 0;
        configure_tiles(rows0, rows1);
        const uint8_t* x0 = memory + runs[t].at;
        const int row0 = runs[t].first - begin, row1 = row0 + rows0;
        _tile_zero(0);
        _tile_zero(1);
        if (rows1) {
            const uint8_t* x1 = memory + runs[t + 1].at;
            _tile_zero(2);
            _tile_zero(3);
            for (int i = 0; i < num_chunks; ++i) {
                for (int r = 0; r < rows0; ++r) prefetch(x0 + ((size_t)(i + 4) * rows0 + r) * 64);
                for (int r = 0; r < rows1; ++r) prefetch(x1 + ((size_t)(i + 4) * rows1 + r) * 64);
                for (int r = 0; r < kTile; ++r) prefetch(w0 + (i + 4) * 1024 + r * 64);
                for (int r = 0; r < kTile; ++r) prefetch(w1 + (i + 4) * 1024 + r * 64);
                _tile_loadd(4, x0 + (size_t)i * rows0 * 64, 64);
                _tile_loadd(6, w0 + (size_t)i * 1024, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, w1 + (size_t)i * 1024, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, x1 + (size_t)i * rows1 * 64, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(2, values.at(0, row1), 64);
            _tile_stored(3, num_blocks > 1 ? values.at(1, row1) : unused, 64);
        } else {
            for (int i = 0; i < num_chunks; ++i) {
                for (int line = 0; line < 16; ++line) {
                    prefetch(w0 + (size_t)i * 1024 + 4096 + line * 64);
                    prefetch(w1 + (size_t)i * 1024 + 4096 + line * 64);
                }
                _tile_loadd(4, x0 + (size_t)i * rows0 * 64, 64);
                _tile_loadd(6, w0 + (size_t)i * 1024, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, w1 + (size_t)i * 1024, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
        }
        _tile_stored(0, values.at(0, row0), 64);
        _tile_stored(1, num_blocks > 1 ? values.at(1, row0) : unused, 64);
    }
}
