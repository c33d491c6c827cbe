#include "thread_pool.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace foregate {

namespace {
using Clock = std::chrono::steady_clock;
constexpr int kTaskBits = 24;
constexpr uint64_t kTaskMask = (1u << kTaskBits) - 1;
constexpr int kSpinsBeforeYield = 2000;
constexpr double kSpinSeconds = 2e-3;  // longer than any gap between two kernels of one step; waking takes tens of us

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}
}  // namespace

ThreadPool::ThreadPool(int num_threads) {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopping_.store(true);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(int num_tasks, Task task, void* context) {
    if (num_tasks <= 0) return;
    if (num_tasks == 1 || workers_.empty()) {
        for (int i = 0; i < num_tasks; ++i) task(context, i);
        return;
    }
    const uint64_t generation = generation_.load(std::memory_order_relaxed) + 1;
    task_ = task;
    context_ = context;
    num_done_.store(0, std::memory_order_relaxed);
    claim_.store(generation << (2 * kTaskBits) | (uint64_t)num_tasks << kTaskBits, std::memory_order_release);
    generation_.store(generation, std::memory_order_seq_cst);
    if (num_parked_.load(std::memory_order_seq_cst) > 0) {
        { std::lock_guard<std::mutex> lock(mutex_); }
        wake_.notify_all();
    }
    drain();
    // a worker that the system has taken its core from may need ours to finish
    for (int spins = 0; num_done_.load(std::memory_order_acquire) < num_tasks; ++spins) {
        if (spins < kSpinsBeforeYield) pause();
        else std::this_thread::yield();
    }
}

void ThreadPool::drain() {
    uint64_t claim = claim_.load(std::memory_order_acquire);
    while ((claim & kTaskMask) < (claim >> kTaskBits & kTaskMask)) {
        if (!claim_.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        task_(context_, (int)(claim & kTaskMask));
        num_done_.fetch_add(1, std::memory_order_acq_rel);
        claim = claim_.load(std::memory_order_acquire);
    }
}

void ThreadPool::work(int) {
    uint64_t seen = 0;
    while (true) {
        int spins = 0;
        Clock::time_point waiting_since;
        uint64_t generation;
        while ((generation = generation_.load(std::memory_order_acquire)) == seen && !stopping_.load()) {
            if (++spins < kSpinsBeforeYield) {
                pause();
                continue;
            }
            if (spins == kSpinsBeforeYield) waiting_since = Clock::now();
            if (std::chrono::duration<double>(Clock::now() - waiting_since).count() < kSpinSeconds) {
                std::this_thread::yield();  // whoever else wants this core may have it
                continue;
            }
            std::unique_lock<std::mutex> lock(mutex_);
            num_parked_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen || stopping_.load(); });
            num_parked_.fetch_sub(1, std::memory_order_relaxed);
            spins = 0;
        }
        if (stopping_.load()) return;
        seen = generation;
        drain();
    }
}

}  // namespace foregate
