// One persistent pool for all kernels of the process: the caller works too, workers spin briefly and then park.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace foregate {

class ThreadPool {
  public:
    using Task = void (*)(void* context, int task);

    explicit ThreadPool(int num_threads);
    ~ThreadPool();

    // Calls task(context, i) for each i in 0..num_tasks-1 on any thread, in any order; returns when all are done.
    // One caller at a time (held by the kernels' lock).
    void run(int num_tasks, Task task, void* context);

    template <class F>
    void parallel(int num_tasks, F&& body) {
        using Body = std::remove_reference_t<F>;
        run(num_tasks, [](void* context, int task) { (*static_cast<Body*>(context))(task); }, (void*)&body);
    }

    int num_threads() const { return (int)workers_.size() + 1; }

  private:
    void work(int index);
    void drain();

    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};  // of the job that is on offer
    std::atomic<uint64_t> claim_{0};       // generation, number of tasks, next task in one word: nobody sees half a job
    std::atomic<int> num_done_{0};
    std::atomic<int> num_parked_{0};
    std::atomic<bool> stopping_{false};
    Task task_ = nullptr;
    void* context_ = nullptr;
};

}  // namespace foregate
