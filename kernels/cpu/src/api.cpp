// The library's C interface: one pool, one instruction set, chosen once; each call holds the pool until it is done.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#if defined(FG_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "thread_pool.h"

namespace foregate {
void route(const float* logits, int num_tokens, int num_experts, int num_active, int mode, int32_t* ids, float* weights);
int group_by_expert(const int32_t* ids, int num_positions, int num_experts, int32_t* experts, int32_t* row_begin,
                    int32_t* positions);
}  // namespace foregate

namespace {

std::mutex mutex;
std::unique_ptr<foregate::ThreadPool> pool;
const foregate::KernelTable* table = nullptr;

#if defined(FG_HAS_AMX)
// The CPU has int8 and bf16 tiles, and the system lets this process keep state in them.
bool may_use_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25, bf16 = 1u << 22;
    if ((d & (tile | int8 | bf16)) != (tile | int8 | bf16)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

bool runs_here(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#if defined(FG_HAS_AMX)
    if (!strcmp(name, "amx")) return runs_here("avx512") && may_use_tiles();
#endif
    if (!strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return !strcmp(name, "portable");
}

// What lies between the kernels of one call; guarded by the mutex, kept for the next.
struct Scratch {
    std::vector<float> memory[4];
    float* take(int which, size_t num_floats) {
        auto& m = memory[which];
        if (m.size() < num_floats + 16) m.resize(num_floats + num_floats / 4 + 16);
        return (float*)(((uintptr_t)m.data() + 63) & ~(uintptr_t)63);
    }
};
Scratch scratch;

foregate::LinearCall with_rows(foregate::LinearCall call, const float* x, int num_rows, float* out, bool accumulate = false) {
    call.x = x;
    call.x_stride = call.num_inputs;
    call.num_rows = num_rows;
    call.out = out;
    call.out_stride = call.num_outputs;
    call.accumulate = accumulate;
    return call;
}

// As foregate_start; the mutex is held.
int start(int num_threads, const char* isa) {
    const foregate::KernelTable* chosen = nullptr;
    const foregate::KernelTable* known[] = {
#if defined(FG_HAS_AMX)
        &foregate::kAmx,
#endif
#if defined(__x86_64__)
        &foregate::kAvx512, &foregate::kAvx2,
#endif
        &foregate::kPortable};
    for (const foregate::KernelTable* candidate : known)
        if (!chosen && runs_here(candidate->name) && (!*isa || !strcmp(isa, candidate->name))) chosen = candidate;
    if (!chosen) return -1;
    table = chosen;
    if (!pool || pool->num_threads() != num_threads) pool = std::make_unique<foregate::ThreadPool>(num_threads);
    return 0;
}

}  // namespace

extern "C" {

// Start the pool with that many threads, and use the named instruction set ("" for the best). 0, or -1 if it is not here.
int foregate_start(int num_threads, const char* isa) {
    std::lock_guard<std::mutex> lock(mutex);
    return start(num_threads, isa);
}

const char* foregate_isa() { return table ? table->name : ""; }
int foregate_num_threads() { return pool ? pool->num_threads() : 0; }

void foregate_linear(const foregate::LinearCall* call) {
    std::lock_guard<std::mutex> lock(mutex);
    table->linear(*pool, *call);
}
void foregate_rms_norm(const float* x, const float* weight, float eps, int num_rows, int size, float* out) {
    std::lock_guard<std::mutex> lock(mutex);
    table->rms_norm(*pool, x, weight, eps, num_rows, size, out);
}
void foregate_combine(const float* outputs, const float* weights, int num_tokens, int num_active, int size, float* out) {
    std::lock_guard<std::mutex> lock(mutex);
    table->combine(*pool, outputs, weights, num_tokens, num_active, size, out);
}

// residual [rows, hidden] += attention of its norm; the new keys and values go to the paged cache first.
void foregate_attention(const foregate::AttentionLayer* layer, const foregate::Step* step, float* residual) {
    std::lock_guard<std::mutex> lock(mutex);
    const int num_rows = step->num_rows, width = layer->qkv.num_outputs, inner = layer->output.num_inputs;
    float* x = scratch.take(0, (size_t)num_rows * layer->hidden_size);
    float* qkv = scratch.take(1, (size_t)num_rows * width);
    float* query = scratch.take(2, (size_t)num_rows * inner);
    float* attended = scratch.take(3, (size_t)num_rows * inner);
    table->rms_norm(*pool, residual, layer->norm, layer->eps, num_rows, layer->hidden_size, x);
    table->linear(*pool, with_rows(layer->qkv, x, num_rows, qkv));
    foregate::QkvCall prepare = layer->prepare;
    prepare.qkv = qkv;
    prepare.num_rows = num_rows;
    prepare.positions = step->positions;
    prepare.slots = step->slots;
    prepare.query = query;
    table->prepare_qkv(*pool, prepare);
    foregate::AttentionCall attention = layer->attention;
    attention.query = query;
    attention.num_seqs = step->num_seqs;
    attention.row_begin = step->row_begin;
    attention.context = step->context;
    attention.block_begin = step->block_begin;
    attention.blocks = step->blocks;
    attention.out = attended;
    table->attention(*pool, attention);
    table->linear(*pool, with_rows(layer->output, attended, num_rows, residual, true));
}

// x = norm of residual [tokens, hidden]; each token's experts and weights; each expert's positions. Returns how many
// experts were chosen.
int foregate_route(const foregate::RouterLayer* layer, const float* residual, int num_tokens, float* x, int32_t* ids,
                   float* weights, int32_t* experts, int32_t* row_begin, int32_t* positions) {
    std::lock_guard<std::mutex> lock(mutex);
    const int num_experts = layer->router.num_outputs, num_active = layer->num_active;
    float* logits = scratch.take(0, (size_t)num_tokens * num_experts);
    table->rms_norm(*pool, residual, layer->norm, layer->eps, num_tokens, layer->router.num_inputs, x);
    table->linear(*pool, with_rows(layer->router, x, num_tokens, logits));
    constexpr int chunk = 32;
    pool->parallel((num_tokens + chunk - 1) / chunk, [&](int task) {
        const int begin = task * chunk, num = num_tokens - begin < chunk ? num_tokens - begin : chunk;
        foregate::route(logits + (size_t)begin * num_experts, num, num_experts, num_active, layer->mode,
                        ids + (size_t)begin * num_active, weights + (size_t)begin * num_active);
    });
    return foregate::group_by_expert(ids, num_tokens * num_active, num_experts, experts, row_begin, positions);
}

// Products of the ready experts. 0, or -1, with nothing done, if no token goes to one of the experts.
int foregate_expert_mlp(const foregate::ExpertCall* call) {
    const foregate::Routing& routing = call->routing;
    for (int i = 0; i < call->num_ready; ++i)
        if (!std::binary_search(routing.experts, routing.experts + routing.num_experts, call->ready[i])) return -1;
    std::lock_guard<std::mutex> lock(mutex);
    table->expert_mlp(*pool, *call);
    return 0;
}

void foregate_mlp(const foregate::MlpLayer* layer, const float* x, int num_rows, float* residual) {
    std::lock_guard<std::mutex> lock(mutex);
    const int hidden = layer->gate_up.num_inputs, inner = layer->down.num_inputs;
    if (layer->norm) {
        float* normed = scratch.take(0, (size_t)num_rows * hidden);
        table->rms_norm(*pool, x, layer->norm, layer->eps, num_rows, hidden, normed);
        x = normed;
    }
    float* gate_up = scratch.take(1, (size_t)num_rows * 2 * inner);
    float* activated = scratch.take(2, (size_t)num_rows * inner);
    table->linear(*pool, with_rows(layer->gate_up, x, num_rows, gate_up));
    table->swiglu(*pool, gate_up, num_rows, inner, activated);
    table->linear(*pool, with_rows(layer->down, activated, num_rows, residual, true));
}

// Pack [outputs, inputs] floats as int8 or int4. Needs no start: packing comes before serving.
void foregate_pack(int format, const float* weight, int num_outputs, int num_inputs, uint8_t* out, int num_threads) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!pool) start(num_threads, "");
    table->pack(*pool, {format, num_outputs, num_inputs, weight, out});
}

// Needs no start: logits may come from elsewhere.
void foregate_choose(const foregate::ChooseCall* call, int num_threads) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!pool) start(num_threads, "");
    table->choose(*pool, *call);
}

// Read memory with all threads, as a roof for what is bound by it; returns a sum so that nothing is left out.
uint64_t foregate_read(const uint64_t* words, int64_t num_words) {
    std::lock_guard<std::mutex> lock(mutex);
    constexpr int64_t chunk = 1 << 19;  // 4 MiB: every one begins by waiting for memory
    std::atomic<uint64_t> total{0};
    pool->parallel((int)((num_words + chunk - 1) / chunk), [&](int task) {
        uint64_t sum[8] = {};
        const int64_t begin = task * chunk, end = begin + chunk < num_words ? begin + chunk : num_words;
        int64_t i = begin;
        for (; i + 8 <= end; i += 8) {
            __builtin_prefetch(words + i + 256);  // without it the kernels, which prefetch, read faster than this
            for (int j = 0; j < 8; ++j) sum[j] += words[i + j];
        }
        for (; i < end; ++i) sum[0] += words[i];
        total += sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
    });
    return total;
}

}  // extern "C"
