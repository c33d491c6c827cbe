// The library's C interface: one pool, one instruction set, chosen once; each call holds the pool until it is done.
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>

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

}  // namespace

extern "C" {

// Start the pool with that many threads, and use the named instruction set ("" for the best). 0, or -1 if it is not here.
int foregate_start(int num_threads, const char* isa) {
    std::lock_guard<std::mutex> lock(mutex);
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

const char* foregate_isa() { return table ? table->name : ""; }
int foregate_num_threads() { return pool ? pool->num_threads() : 0; }

void foregate_expert_mlp(const foregate::ExpertCall* call) {
    std::lock_guard<std::mutex> lock(mutex);
    table->expert_mlp(*pool, *call);
}
void foregate_linear(const foregate::LinearCall* call) {
    std::lock_guard<std::mutex> lock(mutex);
    table->linear(*pool, *call);
}
void foregate_rms_norm(const float* x, const float* weight, float eps, int num_rows, int size, float* out) {
    std::lock_guard<std::mutex> lock(mutex);
    table->rms_norm(*pool, x, weight, eps, num_rows, size, out);
}
void foregate_prepare_qkv(const foregate::QkvCall* call) {
    std::lock_guard<std::mutex> lock(mutex);
    table->prepare_qkv(*pool, *call);
}
void foregate_attention(const foregate::AttentionCall* call) {
    std::lock_guard<std::mutex> lock(mutex);
    table->attention(*pool, *call);
}
void foregate_combine(const float* outputs, const float* weights, int num_tokens, int num_active, int size, float* out,
                      int accumulate) {
    std::lock_guard<std::mutex> lock(mutex);
    table->combine(*pool, outputs, weights, num_tokens, num_active, size, out, accumulate);
}
void foregate_swiglu(const float* gate_up, int num_rows, int size, float* out) {
    std::lock_guard<std::mutex> lock(mutex);
    table->swiglu(*pool, gate_up, num_rows, size, out);
}

int foregate_route(const float* logits, int num_tokens, int num_experts, int num_active, int mode, int32_t* ids,
                   float* weights, int32_t* experts, int32_t* row_begin, int32_t* positions) {
    foregate::route(logits, num_tokens, num_experts, num_active, mode, ids, weights);
    return foregate::group_by_expert(ids, num_tokens * num_active, num_experts, experts, row_begin, positions);
}

// Read memory with all threads, as a roof for what is bound by it; returns a sum so that nothing is left out.
uint64_t foregate_read(const uint64_t* words, int64_t num_words) {
    std::lock_guard<std::mutex> lock(mutex);
    constexpr int64_t chunk = 1 << 15;
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
