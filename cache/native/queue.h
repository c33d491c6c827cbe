// In which order records come up: the C++ twin of cache/transfer_queue.py. Knows no threads and no bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <queue>
#include <unordered_map>
#include <vector>

#include "link_speed.h"

namespace foregate {

// One record on its way.
struct Job {
    uint64_t id;
    int64_t position;
    char* buffer;
    double benefit;
    bool is_demand;
    bool is_queued = true;  // not begun, not cancelled
};

using JobPtr = std::shared_ptr<Job>;

struct QueueRules {
    int64_t record_nbytes;
    int max_uncertain;  // uncertain prefetches that are being read at most
    double certain;     // benefit from which on a prefetch is sure to be asked for
    int max_together;   // records in one read of neighbours
};

// What waits, and what is being read. Not thread-safe.
class Queue {
  public:
    Queue(QueueRules rules, Rate rate, DepthTrials depths) : rules_(rules), rate_(rate), depths_(std::move(depths)) {}

    int depth() const { return depths_.depth(); }
    double bandwidth() const { return rate_.average(); }
    bool is_empty() const { return queued_.empty(); }
    int num_may_begin() const { return std::min((int)queued_.size(), depths_.depth() - num_running_); }
    int64_t in_flight_nbytes() const { return ((int64_t)queued_.size() + num_running_records_) * rules_.record_nbytes; }

    void add(const JobPtr& job) {
        queued_[job->position] = job;
        if (job->is_demand) demands_.push_back(job);
        else prefetches_.push({job->benefit, order_++, job});
    }

    // Somebody waits for it now; whether that is new and it has not begun.
    bool promote(const JobPtr& job) {
        if (job->is_demand) return false;
        job->is_demand = true;
        if (job->is_queued) demands_.push_back(job);
        return job->is_queued;
    }

    // Forget one that has not begun and nobody waits for; whether it was one.
    bool cancel(const JobPtr& job) {
        if (!job->is_queued || job->is_demand) return false;
        take(job);
        return true;
    }

    // The read to begin now, one record or neighbours; empty: none may begin.
    std::vector<JobPtr> next(bool only_demands = false) {
        const JobPtr job = first(only_demands);
        if (!job) return {};
        auto run = with_neighbours(job);
        ++num_running_;
        num_running_prefetches_ += !job->is_demand;
        num_running_records_ += (int64_t)run.size();
        rate_.begin();
        return run;
    }

    void finished(size_t num_records, bool is_demand) {
        const int64_t nbytes = (int64_t)num_records * rules_.record_nbytes;
        --num_running_;
        num_running_prefetches_ -= !is_demand;
        num_running_records_ -= (int64_t)num_records;
        rate_.add(nbytes, num_running_ == 0);
        depths_.add(nbytes, !queued_.empty());
    }

  private:
    struct Prefetch {
        double benefit;
        uint64_t order;
        JobPtr job;
        bool operator<(const Prefetch& other) const {  // of a heap that has the greatest on top
            return benefit != other.benefit ? benefit < other.benefit : order > other.order;
        }
    };

    void take(const JobPtr& job) {
        job->is_queued = false;
        queued_.erase(job->position);
    }

    JobPtr first(bool only_demands) {
        while (!demands_.empty() && !demands_.front()->is_queued) demands_.pop_front();
        while (!prefetches_.empty()) {
            const Job& top = *prefetches_.top().job;
            if (top.is_queued && !top.is_demand) break;
            prefetches_.pop();
        }
        const int depth = depths_.depth();
        if (num_running_ >= depth) return nullptr;
        if (!demands_.empty()) {
            JobPtr job = demands_.front();
            demands_.pop_front();
            return job;
        }
        if (only_demands || prefetches_.empty()) return nullptr;
        // a read that has begun cannot be overtaken, and takes its share of the device from what is waited for
        const bool is_certain = prefetches_.top().benefit >= rules_.certain;
        if (num_running_prefetches_ >= (is_certain ? std::max(depth - 1, rules_.max_uncertain) : rules_.max_uncertain)) return nullptr;
        JobPtr job = prefetches_.top().job;
        prefetches_.pop();
        return job;
    }

    std::vector<JobPtr> with_neighbours(const JobPtr& job) {
        std::deque<JobPtr> run{job};
        take(job);
        for (int step : {1, -1}) {
            for (int64_t position = job->position + step; (int)run.size() < rules_.max_together; position += step) {
                const auto found = queued_.find(position);
                if (found == queued_.end() || found->second->is_demand != job->is_demand) break;
                const JobPtr other = found->second;
                take(other);
                if (step > 0) run.push_back(other);
                else run.push_front(other);
            }
        }
        return {run.begin(), run.end()};
    }

    const QueueRules rules_;
    Rate rate_;
    DepthTrials depths_;
    std::deque<JobPtr> demands_;
    std::priority_queue<Prefetch> prefetches_;
    std::unordered_map<int64_t, JobPtr> queued_;  // by position
    uint64_t order_ = 0;
    int num_running_ = 0, num_running_prefetches_ = 0;
    int64_t num_running_records_ = 0;
};

}  // namespace foregate
