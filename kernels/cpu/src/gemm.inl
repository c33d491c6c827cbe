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
    std::vector<uint8_t> memory[4];
    uint8_t* take(int which, size_t nbytes) {
        auto& m = memory[which];
        if (m.size() < nbytes + 64) m.resize(nbytes + nbytes / 4 + 64);
        return (uint8_t*)(((uintptr_t)m.data() + 63) & ~(uintptr_t)63);
    }
};
static Scratch scratch;

// Results of one product(), for each thread its own.
static Values values_of_thread(int num_rows) {
    static thread_local std::vector<float> memory;
    const size_t wanted = (size_t)num_rows * kBlocks * kLanes + 16;
    if (memory.size() < wanted) memory.resize(wanted);
    return {(float*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63), num_rows};
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
    const int blocks_per_task = num_blocks >= 4 * kBlocks * pool.num_threads() ? kBlocks : kPair;
    pool.parallel(ceil_div(num_blocks, blocks_per_task), [&](int task) {
        const int begin = task * blocks_per_task, end = std::min(num_blocks, begin + blocks_per_task);
        const Values values = values_of_thread(call.num_rows);
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

// An expert's record: gate and up interleaved by blocks of 16 units [I / 16][gate, up], then down [H / 16].
static void expert_mlp(ThreadPool& pool, const ExpertCall& call) {
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
    int num_rows = 0;
    const bool one_token = call.num_tokens == 1;
    for (int e = 0; e < call.num_ready; ++e) {
        const Routing& routing = call.routing;
        const int32_t* found = std::lower_bound(routing.experts, routing.experts + routing.num_experts, call.ready[e]);
        const int32_t* rows = routing.row_begin + (found - routing.experts);
        const int num = rows[1] - rows[0];
        first_run.push_back((int)runs.size());
        cut_runs(in, num_rows, num_rows + num, runs, total);
        cut_runs(out, num_rows, num_rows + num, inner_runs, inner_total);
        for (int i = rows[0]; i < rows[1]; ++i) position_of.push_back(routing.positions[i]);
        num_rows += num;
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
    const int units_per_task = kBlocks / 2 * kLanes, num_gates = inner / units_per_task;
    const int num_blocks = hidden / kLanes, blocks_per_task = kBlocks;
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
        const RowSpan* mine = runs.data() + first_run[e];
        const int num_runs = first_run[e + 1] - first_run[e];
        const Values values = values_of_thread(rows_of(mine, num_runs));
        filled[e].wait();
        product(in, call.records[e] + (size_t)(begin / kLanes) * 2 * in.block_nbytes, kBlocks, mine, num_runs, memory, values);
        for (int r = 0; r < values.num_rows; ++r)
            for (int b = 0; b < kBlocks; b += 2) {
                const F16 g = f_load(values.at(b, r)), up = f_load(values.at(b + 1, r));
                const F16 silu = f_div(g, f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), g))));
                f_store(activated + (size_t)(mine[0].first + r) * inner + begin + b / 2 * kLanes, f_mul(silu, up));
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
        const Values values = values_of_thread(rows_of(mine, num_runs));
        gated[e].wait();
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
        if (task < call.num_ready * num_gates) return gate_and_up(task / num_gates, task % num_gates * units_per_task);
        task -= call.num_ready * num_gates;
        down(task / num_downs, task % num_downs * blocks_per_task);
    });
}
