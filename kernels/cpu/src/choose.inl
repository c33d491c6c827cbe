// The next token of each row of logits: the likeliest, or a draw from what temperature, top_k, top_p and min_p leave.
// Included inside an instruction set's namespace, after vec.h.
//
// A draw inverts the cumulative distribution in the order of the tokens' numbers. Nothing is sorted but a few: what is
// kept are the best, so it ends at one token, which lies in one bin of a histogram of distances from the best.

constexpr int kSumBlock = 256;        // probabilities that are summed as floats; their sums are doubles
constexpr int kBins = 2048;           // of distances below kBins / kBinsPerNat; one more for all beyond
constexpr float kBinsPerNat = 64.0f;  // exp(-32) of the best, and less, share the last
constexpr float kNone = 87.0f;        // a distance whose probability is as good as zero, and is taken for it

struct Bin {
    double weight;
    int64_t count;
};

// The row of one draw, and memory of its thread.
struct Choice {
    const float* logits;  // of the call, or `masked`
    int size;             // of the vocabulary
    std::vector<float> masked;
    float top;      // the largest logit
    float inverse;  // of the temperature
    std::vector<float> probs;  // relative to the best, zero for what is not kept; the last block is padded with zeros
    std::vector<double> sums;  // of each block
    std::vector<uint16_t> bins;  // of each token
    std::vector<Bin> filled;
    std::vector<std::pair<float, int>> bin;  // the tokens of one

    float distance(int i) const { return (top - logits[i]) * inverse; }
};

static float largest(const float* x, int size) {
    float top = -INFINITY;
    int i = 0;
    F16 tops = f_set1(-INFINITY);
    for (; i + 16 <= size; i += 16) tops = f_max(f_load(x + i), tops);
    float lanes[16];
    f_store(lanes, tops);
    for (float lane : lanes) top = std::max(top, lane);
    for (; i < size; ++i) top = std::max(top, x[i]);
    return top;
}

// A comparison with a NaN is false, so one would pass for a token that never comes.
static bool has_nan(const float* x, int size) {
    int is_any = 0;
    for (int i = 0; i < size; ++i) is_any |= x[i] != x[i];
    return is_any != 0;
}

static void sum_blocks(Choice& c) {
    for (size_t b = 0; b < c.sums.size(); ++b) {
        F16 sum = f_zero();
        for (int i = 0; i < kSumBlock; i += 16) sum = f_add(sum, f_load(&c.probs[b * kSumBlock + i]));
        float lanes[16];
        f_store(lanes, sum);
        double total = 0.0;
        for (float lane : lanes) total += lane;
        c.sums[b] = total;
    }
}

static double total_of(const Choice& c) {
    double total = 0.0;
    for (double sum : c.sums) total += sum;
    return total;
}

static void exponentiate(Choice& c) {
    const size_t num_blocks = (size_t)(c.size + kSumBlock - 1) / kSumBlock;
    c.sums.resize(num_blocks);
    c.probs.resize(num_blocks * kSumBlock);
    const F16 top = f_set1(c.top), minus = f_set1(-c.inverse);
    int i = 0;
    for (; i + 16 <= c.size; i += 16) f_store(&c.probs[i], f_exp(f_mul(f_sub(top, f_load(c.logits + i)), minus)));
    for (; i < c.size; ++i) c.probs[i] = exp_of((c.top - c.logits[i]) * -c.inverse);
    for (i = 0; i < c.size; ++i) c.probs[i] = c.distance(i) < kNone ? c.probs[i] : 0.0f;
    std::fill(c.probs.begin() + c.size, c.probs.end(), 0.0f);
}

static void fill_bins(Choice& c) {
    c.bins.resize(c.size);
    for (int i = 0; i < c.size; ++i) c.bins[i] = (uint16_t)(int)std::min(c.distance(i) * kBinsPerNat, (float)kBins);
    // neighbours go to different memory, where they need not wait for one another's sum
    constexpr int kApart = 4, kStride = kBins + 1;
    c.filled.assign(kApart * kStride, Bin{0.0, 0});
    for (int i = 0; i < c.size; ++i) {
        Bin& bin = c.filled[(i % kApart) * kStride + c.bins[i]];
        bin.weight += c.probs[i];
        ++bin.count;
    }
    for (int part = 1; part < kApart; ++part)
        for (int b = 0; b < kStride; ++b) {
            c.filled[b].weight += c.filled[part * kStride + b].weight;
            c.filled[b].count += c.filled[part * kStride + b].count;
        }
}

// The tokens of a bin, best first; of equals the one with the lower number.
static void sort_bin(Choice& c, int which) {
    c.bin.clear();
    constexpr int kLook = 64;  // tokens looked at together: few are in any one bin
    for (int begin = 0; begin < c.size; begin += kLook) {
        const int end = std::min(c.size, begin + kLook);
        int is_any = 0;
        for (int i = begin; i < end; ++i) is_any |= c.bins[i] == which;
        for (int i = begin; is_any && i < end; ++i)
            if (c.bins[i] == which) c.bin.push_back({c.logits[i], i});
    }
    std::sort(c.bin.begin(), c.bin.end(), [](const auto& a, const auto& b) {
        return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
}

// The last of the best that are kept: how many, their weight, and which it is.
struct Cut {
    int num;
    double weight;
    float logit;
    int token;
};

// Go on from the best until so many are kept, or so much weight: the token that crosses it stays.
static Cut cut_at(Choice& c, int num, double weight) {
    Cut cut{0, 0.0, -INFINITY, c.size};
    int b = 0;
    while (b < kBins && cut.num + c.filled[b].count < num && cut.weight + c.filled[b].weight < weight) {
        cut.num += (int)c.filled[b].count;
        cut.weight += c.filled[b++].weight;
    }
    sort_bin(c, b);
    for (const auto& [logit, token] : c.bin) {
        if (cut.num >= num || cut.weight >= weight) break;
        cut = {cut.num + 1, cut.weight + c.probs[token], logit, token};
    }
    return cut;
}

// Set what top_k, top_p and min_p leave out to zero.
static void filter(Choice& c, const Draw& draw, double total) {
    const bool has_top_k = draw.top_k > 0 && draw.top_k < c.size;
    if (has_top_k || draw.top_p < 1.0) {
        fill_bins(c);
        Cut cut{c.size, total, -INFINITY, c.size};
        if (has_top_k) cut = cut_at(c, draw.top_k, INFINITY);
        if (draw.top_p < 1.0) cut = cut_at(c, cut.num, draw.top_p * cut.weight);
        for (int i = 0; i < c.size; ++i) {
            const bool is_kept = (c.logits[i] > cut.logit) | ((c.logits[i] == cut.logit) & (i <= cut.token));
            c.probs[i] = is_kept ? c.probs[i] : 0.0f;
        }
    }
    if (draw.min_p > 0.0) {
        const float least = (float)draw.min_p;
        for (int i = 0; i < c.size; ++i) c.probs[i] = c.probs[i] >= least ? c.probs[i] : 0.0f;
    }
}

// The token whose part of the sum of probabilities holds `uniform` of it.
static int invert(const Choice& c, double uniform) {
    const double target = uniform * total_of(c);
    double before = 0.0;
    int last = -1;
    for (size_t b = 0; b < c.sums.size(); ++b) {
        if (c.sums[b] == 0.0) continue;
        const double after = before + c.sums[b];
        const bool is_here = after > target;
        for (int i = (int)b * kSumBlock, end = std::min(c.size, i + kSumBlock); is_here && i < end; ++i) {
            if (c.probs[i] == 0.0f) continue;
            last = i;
            before += c.probs[i];
            if (before > target) return i;
        }
        if (is_here) return last;  // its floats' sum was rounded up
        before = after;
    }
    for (int i = c.size; i-- > 0;)  // the target was rounded up to the whole
        if (c.probs[i] > 0.0f) return i;
    return -1;
}

static const float* mask(Choice& c, const float* logits, const uint32_t* allowed) {
    c.masked.resize(c.size);
    for (int begin = 0; begin < c.size; begin += 32) {
        const uint32_t bits = allowed[begin / 32];
        const int num = std::min(32, c.size - begin);
        for (int i = 0; i < num; ++i) c.masked[begin + i] = bits >> i & 1 ? logits[begin + i] : -INFINITY;
    }
    return c.masked.data();
}

static int choose_row(const float* logits, int size, const Draw& draw) {
    static thread_local Choice c;
    c.size = size;
    c.logits = logits = draw.allowed ? mask(c, logits, draw.allowed) : logits;
    c.top = largest(logits, size);
    if (!std::isfinite(c.top) || has_nan(logits, size)) return -1;
    if (draw.temperature == 0.0) return (int)(std::find(logits, logits + size, c.top) - logits);
    c.inverse = 1.0f / std::max((float)draw.temperature, 1e-6f);
    exponentiate(c);
    sum_blocks(c);
    const double total = total_of(c);
    if (draw.top_k > 0 || draw.top_p < 1.0 || draw.min_p > 0.0) {
        filter(c, draw, total);
        sum_blocks(c);
    }
    return invert(c, draw.uniform);
}

static void choose(ThreadPool& pool, const ChooseCall& call) {
    pool.parallel(call.num_rows, [&](int row) {
        call.tokens[row] = choose_row(call.logits[row], call.vocab_size, call.draws[row]);
    });
}
