// Dense products and the expert MLP, made of products of blocks. Included inside an instruction set's namespace, after
// product.inl.

// Counts down to zero what others wait for.
class Countdown {
public:
    void start(int num) { left_.store(num, std::memory_order_relaxed); }
    // Whether all others are done: what is left to do before done() may then read what they wrote. If not, counts down.
    bool is_last() {
        int left = left_.load(std::memory_order_acquire);
        while (left > 1)
            if (left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_acquire)) return false;
        return true;
    }
    void done() { left_.fetch_sub(1, std::memory_order_release); }
    void wait() const {
        for (int spins = 0; left_.load(std::memory_order_acquire) > 0; ++spins)
            if (spins > 1000) std::this_thread::yield();  // the system may have taken the other's core
    }

private:
    std::atomic<int> left_{0};
};

// Memory for one kernel call, kept for the next: kernels are called by one thread at a time.
struct Scratch {
    std::vector<uint8_t> memory[5];
    uint8_t* take(int which, size_t nbytes) {
        auto& m = memory[which];
        if (m.size() < nbytes + 64) m.resize(nbytes + nbytes / 4 + 64);
        return (uint8_t*)(((uintptr_t)m.data() + 63) & ~(uintptr_t)63);
    }
};
static Scratch scratch;

// Results of one product(), for each thread its own.
static Values values_of_thread(int num_rows, int num_blocks) {
    static thread_local std::vector<float> memory;
    const size_t wanted = (size_t)num_rows * num_blocks * kLanes + 16;
    if (memory.size() < wanted) memory.resize(wanted);
    return {(float*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63), num_rows};
}

// Blocks that a task takes of the `num_blocks` of one matrix, of `num_in_all` in the call, for products with `num_rows` rows:
// as many as leave each thread some tasks, and whose results stay in the L2 cache; an even number.
static int blocks_of_task(const ThreadPool& pool, int num_blocks, int num_in_all, int num_rows) {
    constexpr int tasks_per_thread = 8, values_nbytes = 128 << 10;
    const int most = std::min(num_in_all / (tasks_per_thread * pool.num_threads()), values_nbytes / 64 / std::max(1, num_rows));
    return std::min(num_blocks, std::max(kFewBlocks, std::min(kTaskBlocks, most / 2 * 2)));
}

// Rows begin..end cut into runs of at most 16, as even as possible.
static void cut_runs(const Shape& shape, int begin, int end, std::vector<RowSpan>& runs, size_t& at) {
    const int num = end - begin, num_runs = ceil_div(num, kTile);
    for (int i = 0; i < num_runs; ++i) {
        const int first = begin + (int)((int64_t)num * i / num_runs), last = begin + (int)((int64_t)num * (i + 1) / num_runs);
        runs.push_back({first, last - first, at});
        at += shape.tile_nbytes(last - first);
    }
}

// An expert's runs, one after the other: their rows. At least one run.
static inline int rows_of(const RowSpan* runs, int num_runs) {
    return runs[num_runs - 1].first + runs[num_runs - 1].num_rows - runs[0].first;
}

static void linear(ThreadPool& pool, const LinearCall& call) {
    const Shape shape(call.format, call.num_inputs, true);
    static std::vector<RowSpan> runs;
    runs.clear();
    size_t total = 0;
    cut_runs(shape, 0, call.num_rows, runs, total);
    uint8_t* memory = scratch.take(0, total);
    auto fill = [&](int row) {
        const RowSpan& run = runs[((int64_t)(row + 1) * (int)runs.size() - 1) / call.num_rows];
        put_row(shape, call.x + row * call.x_stride, Tile(shape, memory + run.at, run.num_rows), row - run.first);
    };
    if (call.num_rows <= 2) for (int row = 0; row < call.num_rows; ++row) fill(row);
    else pool.parallel(call.num_rows, fill);
    const int num_blocks = ceil_div(call.num_outputs, kLanes);
    const int blocks_per_task =
        num_blocks >= 4 * kFewBlocks * pool.num_threads() ? blocks_of_task(pool, num_blocks, num_blocks, call.num_rows) : kPair;
    pool.parallel(ceil_div(num_blocks, blocks_per_task), [&](int task) {
        const int begin = task * blocks_per_task, end = std::min(num_blocks, begin + blocks_per_task);
        const Values values = values_of_thread(call.num_rows, end - begin);
        const TileScope tiles;
        product(shape, call.weight + begin * shape.block_nbytes, end - begin, runs.data(), (int)runs.size(), memory, values);
        for (int row = 0; row < call.num_rows; ++row)
            for (int b = begin; b < end; ++b) {
                const float* from = values.at(b - begin, row);
                const int column = b * kLanes, num = std::min(kLanes, call.num_outputs - column);
                float* to = call.out + row * call.out_stride + column;
                F16 value = f_load(from);
                if (call.bias) value = f_add(value, load_upto(call.bias + column, num));
                if (call.accumulate) value = f_add(load_upto(to, num), value);
                store_upto(to, value, num);
            }
    });
}

// silu(gate) * up
static inline F16 gated_up(F16 gate, F16 up) {
    const F16 silu = f_div(gate, f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), gate))));
    return f_mul(silu, up);
}

// The rows of a call's ready expert in its routing.
static inline const int32_t* rows_of_ready(const ExpertCall& call, int e) {
    const Routing& routing = call.routing;
    return routing.row_begin + (std::lower_bound(routing.experts, routing.experts + routing.num_experts, call.ready[e]) - routing.experts);
}

// An expert's record: gate and up interleaved by blocks of 16 units [I / 16][gate, up], then down [H / 16].
static void products_of_experts(ThreadPool& pool, const ExpertCall& call) {
    const int hidden = call.hidden_size, inner = call.intermediate_size;
    const Shape in(call.format, hidden), out(call.format, inner);
    const size_t down_at = (size_t)(inner / kLanes) * 2 * in.block_nbytes;
    static std::vector<RowSpan> runs, inner_runs;
    static std::vector<int> first_run, position_of;  // of each ready expert; of each row
    runs.clear();
    inner_runs.clear();
    first_run.clear();
    position_of.clear();
    size_t total = 0, inner_total = 0;
    int num_rows = 0, most_rows = 0;  // of all experts, of one
    const bool one_token = call.num_tokens == 1;
    for (int e = 0; e < call.num_ready; ++e) {
        const int32_t* rows = rows_of_ready(call, e);
        const int num = rows[1] - rows[0];
        first_run.push_back((int)runs.size());
        cut_runs(in, num_rows, num_rows + num, runs, total);
        cut_runs(out, num_rows, num_rows + num, inner_runs, inner_total);
        for (int i = rows[0]; i < rows[1]; ++i) position_of.push_back(call.routing.positions[i]);
        num_rows += num;
        most_rows = std::max(most_rows, num);
    }
    first_run.push_back((int)runs.size());
    if (one_token)  // all experts read the same row
        for (RowSpan& run : runs) run.at = 0;
    uint8_t* memory = scratch.take(0, total);
    uint8_t* inner_memory = scratch.take(1, inner_total);
    float* activated = (float*)scratch.take(2, (size_t)num_rows * inner * sizeof(float));

    // One parallel region of four kinds of tasks, each waiting for those before it that it needs. Tasks are taken in
    // order, so what a task waits for is done or being done.
    static std::vector<Countdown> filled, gated;  // of each expert
    if ((int)filled.size() < call.num_ready) {
        filled = std::vector<Countdown>(call.num_ready);
        gated = std::vector<Countdown>(call.num_ready);
    }
    const int num_gate_blocks = inner / kLanes * 2, num_blocks = hidden / kLanes;
    const int gate_blocks_per_task = blocks_of_task(pool, num_gate_blocks, call.num_ready * num_gate_blocks, most_rows);
    const int blocks_per_task = blocks_of_task(pool, num_blocks, call.num_ready * num_blocks, most_rows);
    const int num_gates = ceil_div(num_gate_blocks, gate_blocks_per_task);
    const int num_downs = ceil_div(num_blocks, blocks_per_task), num_fills = one_token ? 0 : (int)runs.size();
    // where a token goes to several of these experts it is quantised once, and copied to each
    const bool copies = !one_token && num_rows >= 2 * call.num_tokens;
    constexpr int tokens_per_task = 8;
    const int num_tokens_tasks = copies ? ceil_div(call.num_tokens, tokens_per_task) : 0;
    const size_t token_nbytes = in.tile_nbytes(1);
    uint8_t* tokens = scratch.take(3, copies ? call.num_tokens * token_nbytes : 0);
    static Countdown quantised;
    quantised.start(num_tokens_tasks);
    for (int e = 0; e < call.num_ready; ++e) {
        filled[e].start(one_token ? 0 : first_run[e + 1] - first_run[e]);
        gated[e].start(num_gates);
    }
    if (one_token) put_row(in, call.x, Tile(in, memory, 1), 0);

    auto quantise = [&](int begin) {
        for (int t = begin; t < std::min(call.num_tokens, begin + tokens_per_task); ++t)
            put_row(in, call.x + (size_t)t * hidden, Tile(in, tokens + t * token_nbytes, 1), 0);
        quantised.done();
    };

    auto fill = [&](int t) {
        const Tile tile(in, memory + runs[t].at, runs[t].num_rows);
        quantised.wait();
        for (int r = 0; r < tile.num_rows; ++r) {
            const int token = position_of[runs[t].first + r] / call.num_active;
            if (copies) copy_row(in, Tile(in, tokens + token * token_nbytes, 1), tile, r);
            else put_row(in, call.x + (size_t)token * hidden, tile, r);
        }
        filled[std::upper_bound(first_run.begin(), first_run.end(), t) - first_run.begin() - 1].done();
    };

    auto gate_and_up = [&](int e, int begin) {
        const int num = std::min(gate_blocks_per_task, num_gate_blocks - begin);
        const RowSpan* mine = runs.data() + first_run[e];
        const int num_runs = first_run[e + 1] - first_run[e];
        const Values values = values_of_thread(rows_of(mine, num_runs), num);
        filled[e].wait();
        const TileScope tiles;
        product(in, call.records[e] + begin * in.block_nbytes, num, mine, num_runs, memory, values);
        for (int r = 0; r < values.num_rows; ++r)
            for (int b = 0; b < num; b += 2) {
                float* to = activated + (size_t)(mine[0].first + r) * inner + (begin + b) / 2 * kLanes;
                f_store(to, gated_up(f_load(values.at(b, r)), f_load(values.at(b + 1, r))));
            }
        if (!gated[e].is_last()) return;
        for (int t = first_run[e]; t < first_run[e + 1]; ++t) {
            const Tile tile(out, inner_memory + inner_runs[t].at, inner_runs[t].num_rows);
            for (int r = 0; r < tile.num_rows; ++r)
                put_row(out, activated + (size_t)(inner_runs[t].first + r) * inner, tile, r);
        }
        gated[e].done();
    };

    auto down = [&](int e, int begin) {
        const int end = std::min(num_blocks, begin + blocks_per_task);
        const RowSpan* mine = inner_runs.data() + first_run[e];
        const int num_runs = first_run[e + 1] - first_run[e];
        const Values values = values_of_thread(rows_of(mine, num_runs), end - begin);
        gated[e].wait();
        const TileScope tiles;
        product(out, call.records[e] + down_at + begin * out.block_nbytes, end - begin, mine, num_runs, inner_memory, values);
        for (int r = 0; r < values.num_rows; ++r) {  // all columns of a row together: rows lie pages apart
            float* to = call.out + (size_t)position_of[mine[0].first + r] * hidden + begin * kLanes;
            for (int b = 0; b < end - begin; ++b) f_store(to + b * kLanes, f_load(values.at(b, r)));
        }
    };

    pool.parallel(num_tokens_tasks + num_fills + call.num_ready * (num_gates + num_downs), [&](int task) {
        if (task < num_tokens_tasks) return quantise(task * tokens_per_task);
        task -= num_tokens_tasks;
        if (task < num_fills) return fill(task);
        task -= num_fills;
        if (task < call.num_ready * num_gates) return gate_and_up(task / num_gates, task % num_gates * gate_blocks_per_task);
        task -= call.num_ready * num_gates;
        down(task / num_downs, task % num_downs * blocks_per_task);
    });
}

// Chunks of that many tokens go through all experts, one thread each, and are added up while their products are in its L2
// cache. For tiny experts, whose products are larger than their weights.
static void expert_mlp_by_tokens(ThreadPool& pool, const ExpertCall& call, int num_tokens) {
    const int hidden = call.hidden_size, inner = call.intermediate_size, num_active = call.num_active;
    const Shape in(call.format, hidden), out(call.format, inner);
    const size_t down_at = (size_t)(inner / kLanes) * 2 * in.block_nbytes, token_nbytes = in.tile_nbytes(1);
    const int num_blocks = hidden / kLanes;
    pool.parallel(ceil_div(call.num_tokens, num_tokens), [&](int task) {
        static thread_local Scratch memory;
        static thread_local std::vector<RowSpan> runs, inner_runs;
        const TileScope tiles_in_use;
        const int begin = task * num_tokens, end = std::min(call.num_tokens, begin + num_tokens), num_mine = end - begin;
        uint8_t* tokens = memory.take(0, num_mine * token_nbytes);
        float* products = (float*)memory.take(1, (size_t)num_mine * num_active * hidden * sizeof(float));
        for (int t = 0; t < num_mine; ++t) put_row(in, call.x + (size_t)(begin + t) * hidden, Tile(in, tokens + t * token_nbytes, 1), 0);
        for (int e = 0; e < call.num_ready; ++e) {
            const int32_t* rows = rows_of_ready(call, e);
            const int32_t* last = call.routing.positions + rows[1];
            const int32_t* position = std::lower_bound(call.routing.positions + rows[0], last, begin * num_active);
            const int num_rows = (int)(std::lower_bound(position, last, end * num_active) - position);
            if (num_rows == 0) continue;
            size_t total = 0, inner_total = 0;
            runs.clear();
            inner_runs.clear();
            cut_runs(in, 0, num_rows, runs, total);
            cut_runs(out, 0, num_rows, inner_runs, inner_total);
            uint8_t *tiles = memory.take(2, total), *inner_tiles = memory.take(3, inner_total);
            float* activated = (float*)memory.take(4, (size_t)num_rows * inner * sizeof(float));
            for (const RowSpan& run : runs)
                for (int r = 0; r < run.num_rows; ++r) {
                    const Tile token(in, tokens + (position[run.first + r] / num_active - begin) * token_nbytes, 1);
                    copy_row(in, token, Tile(in, tiles + run.at, run.num_rows), r);
                }
            const Values values = values_of_thread(num_rows, kFewBlocks);
            const int num_runs = (int)runs.size();
            for (int unit = 0; unit < inner; unit += kFewBlocks / 2 * kLanes) {
                product(in, call.records[e] + unit / kLanes * 2 * in.block_nbytes, kFewBlocks, runs.data(), num_runs, tiles, values);
                for (int r = 0; r < num_rows; ++r)
                    for (int b = 0; b < kFewBlocks; b += 2) {
                        float* to = activated + (size_t)r * inner + unit + b / 2 * kLanes;
                        f_store(to, gated_up(f_load(values.at(b, r)), f_load(values.at(b + 1, r))));
                    }
            }
            for (const RowSpan& run : inner_runs)
                for (int r = 0; r < run.num_rows; ++r)
                    put_row(out, activated + (size_t)(run.first + r) * inner, Tile(out, inner_tiles + run.at, run.num_rows), r);
            for (int first = 0; first < num_blocks; first += kFewBlocks) {
                const int num = std::min(kFewBlocks, num_blocks - first);
                product(out, call.records[e] + down_at + first * out.block_nbytes, num, inner_runs.data(), num_runs, inner_tiles, values);
                for (int r = 0; r < num_rows; ++r) {
                    float* to = products + (size_t)(position[r] - begin * num_active) * hidden + first * kLanes;
                    for (int b = 0; b < num; ++b) f_store(to + b * kLanes, f_load(values.at(b, r)));
                }
            }
        }
        for (int t = 0; t < num_mine; ++t)
            combine_row(products + (size_t)t * num_active * hidden, call.weights + (size_t)(begin + t) * num_active, num_active, hidden,
                        call.residual + (size_t)(begin + t) * hidden);
    });
}

// Of a chunk of tokens, for expert_mlp_by_tokens: its size, or 0 if the call is not worth cutting so.
static int tokens_per_task(const ExpertCall& call, int num_threads) {
    constexpr size_t weights_nbytes = 4 << 20;   // of all experts: every chunk reads them anew
    constexpr size_t products_nbytes = 1 << 20;  // of a chunk: what leaves room for weights in the L2 cache
    constexpr int rows_per_expert = 8;           // of a chunk: what a product needs to be fast
    if (!call.residual || call.num_ready < call.routing.num_experts) return 0;
    const Shape in(call.format, call.hidden_size), out(call.format, call.intermediate_size);
    const size_t gate_up_nbytes = call.intermediate_size / kLanes * 2 * in.block_nbytes;
    const size_t down_nbytes = call.hidden_size / kLanes * out.block_nbytes;
    if (call.num_ready * (gate_up_nbytes + down_nbytes) > weights_nbytes) return 0;
    const size_t nbytes = (size_t)call.num_tokens * call.num_active * call.hidden_size * sizeof(float);
    const int num_rounds = (int)(nbytes / (products_nbytes * num_threads)) + 1;
    const int num_tokens = ceil_div(call.num_tokens, num_rounds * num_threads);
    return num_tokens * call.num_active >= rows_per_expert * call.num_ready ? num_tokens : 0;
}

static void expert_mlp(ThreadPool& pool, const ExpertCall& call) {
    const int num_tokens = tokens_per_task(call, pool.num_threads());
    if (num_tokens > 0) return expert_mlp_by_tokens(pool, call, num_tokens);
    products_of_experts(pool, call);
    if (call.residual) combine(pool, call.out, call.weights, call.num_tokens, call.num_active, call.hidden_size, call.residual);
}
