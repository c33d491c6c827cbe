// Float weights to packed int8 and int4, the same bits as kernels/quant/blocked.py. Included inside an instruction set's
// namespace, after product.inl. Lanes are the 16 outputs of a block.

// One span of a block of weights, in steps of each output's scale: [inputs, 16 outputs] in -127..127.
struct SpanInSteps {
    alignas(64) float values[kSpanPieces * kPiece * kLanes];
    uint16_t scales[kLanes];  // bf16: a 127th of the largest, rounded up
};

static void to_steps(const PackCall& call, int block, int span, SpanInSteps& out) {
    const int first = span * kSpanPieces * kPiece, num = std::min(kSpanPieces * kPiece, call.num_inputs - first);
    memset(out.values, 0, sizeof(out.values));
    for (int r = 0; r < kLanes; ++r) {
        const int output = block * kLanes + r;
        out.scales[r] = 0;
        if (output >= call.num_outputs) continue;
        const float* w = call.weight + (size_t)output * call.num_inputs + first;
        F16 top = f_zero();
        for (int k = 0; k < num; k += kLanes) top = f_max(top, f_abs(load_inputs(w, k, num)));
        const float wanted = f_top(top) / 127.0f;
        out.scales[r] = to_bf16(wanted);
        if (from_bf16(out.scales[r]) < wanted) ++out.scales[r];
        const float scale = from_bf16(out.scales[r]), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        for (int k = 0; k < num; ++k) out.values[k * kLanes + r] = std::min(127.0f, std::max(-127.0f, w[k] * inverse));
    }
}

static void pack_int8_piece(const float* values, uint8_t* out) {
    alignas(16) int8_t q[kPiece][kLanes];
    for (int k = 0; k < kPiece; ++k) i_store_s8(q[k], i_from_f(f_load(values + k * kLanes)));
    for (int k = 0; k < kPiece; ++k)
        for (int r = 0; r < kLanes; ++r) out[k / 4 * 64 + r * 4 + k % 4] = (uint8_t)(q[k][r] + 128);
}

// A group's nibbles for a step and a base of each output; with what they leave of the values, if asked for.
static inline F16 to_nibbles(const float* values, const float* steps, const float* bases, int8_t (*nibbles)[kLanes]) {
    const F16 step = f_load(steps), inverse = f_div(f_set1(1.0f), step), offset = f_sub(f_load(bases), f_set1(128.0f));
    F16 error = f_zero();
    for (int k = 0; k < kGroup; ++k) {
        const F16 value = f_load(values + k * kLanes);
        const F16 u = f_min(f_max(f_round(f_mul(f_sub(value, offset), inverse)), f_zero()), f_set1(15.0f));
        const F16 off = f_sub(f_add(f_mul(u, step), offset), value);
        error = f_add(error, f_mul(off, off));
        if (nibbles) i_store_s8(nibbles[k], i_from_f(u));
    }
    return error;
}

// Of a few pairs of step and base, those with the smallest error: see blocked.py.
static void choose_steps(const float* values, float* steps, float* bases) {
    alignas(64) float low[kLanes], high[kLanes], best[kLanes], step[kLanes], base[kLanes], error[kLanes];
    F16 smallest = f_load(values), largest = smallest;
    for (int k = 1; k < kGroup; ++k) {
        smallest = f_min(smallest, f_load(values + k * kLanes));
        largest = f_max(largest, f_load(values + k * kLanes));
    }
    f_store(low, smallest);
    f_store(high, largest);
    for (int r = 0; r < kLanes; ++r) {
        best[r] = INFINITY;
        steps[r] = 1.0f;
        bases[r] = 128.0f;
    }
    constexpr struct { float smaller, share; } kTried[] = {{0, 0.5f}, {1, 0.5f}, {1, 0.25f}, {1, 0.75f}, {2, 0.5f}, {2, 0.25f}, {2, 0.75f}};
    for (const auto& tried : kTried) {
        for (int r = 0; r < kLanes; ++r) {
            const float range = high[r] - low[r];
            const float full = std::min(17.0f, std::max(1.0f, ceilf(range / 15.0f)));
            step[r] = std::max(1.0f, full - tried.smaller);
            const float slack = range - 15.0f * step[r];
            base[r] = std::min(255.0f - 15.0f * step[r], std::max(0.0f, nearbyintf((low[r] + slack * tried.share) + 128.0f)));
        }
        f_store(error, to_nibbles(values, step, base, nullptr));
        for (int r = 0; r < kLanes; ++r) {
            if (!(error[r] < best[r])) continue;
            best[r] = error[r];
            steps[r] = step[r];
            bases[r] = base[r];
        }
    }
}

static void pack_int4_piece(const float* values, uint8_t* out) {
    for (int g = 0; g < kPiece / kGroup; ++g, values += kGroup * kLanes) {
        alignas(64) float steps[kLanes], bases[kLanes];
        alignas(16) int8_t q[kGroup][kLanes];
        choose_steps(values, steps, bases);
        to_nibbles(values, steps, bases, q);
        for (int k = 0; k < kGroup; ++k) {
            if (k % 8 >= 4) continue;
            for (int r = 0; r < kLanes; ++r) out[g * 256 + k / 8 * 64 + r * 4 + k % 4] = (uint8_t)(q[k][r] | q[k + 4][r] << 4);
        }
        for (int r = 0; r < kLanes; ++r) {
            out[512 + g * kLanes + r] = (uint8_t)steps[r];
            out[544 + r * 2 + g] = (uint8_t)bases[r];
        }
    }
}

static void pack(ThreadPool& pool, const PackCall& call) {
    const Shape shape(call.format, call.num_inputs);
    pool.parallel(ceil_div(call.num_outputs, kLanes), [&](int b) {
        uint8_t* block = call.out + b * shape.block_nbytes;
        const size_t scales_at = shape.scales(block) - block;
        SpanInSteps span;
        for (int s = 0; s < shape.num_spans; ++s) {
            to_steps(call, b, s, span);
            for (int p = s * kSpanPieces; p < std::min(shape.num_pieces, (s + 1) * kSpanPieces); ++p) {
                const float* values = span.values + (p - s * kSpanPieces) * kPiece * kLanes;
                if (call.format == kInt4) pack_int4_piece(values, block + p * shape.piece_nbytes);
                else pack_int8_piece(values, block + p * shape.piece_nbytes);
            }
            memcpy(block + scales_at + s * 32, span.scales, 32);
        }
        const size_t end = scales_at + shape.num_spans * 32;
        memset(block + end, 0, shape.block_nbytes - end);
    });
}
