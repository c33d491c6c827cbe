// Reads records into slots on threads of its own that never need the interpreter: the C++ twin of cache/transfer.py.
// What has arrived waits in a list until somebody asks; see cache/native_transfer.py.
#include <sys/uio.h>

#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>

#define XXH_INLINE_ALL
#include "queue.h"
#include "xxhash.h"

namespace foregate {

constexpr int64_t kAlignment = 4096;  // of O_DIRECT
constexpr std::chrono::microseconds kAnnounced{500};     // before the link is free its next record is chosen
constexpr std::chrono::microseconds kWorthSleeping{30};  // what arrives early by less is made up for by the next

enum Status : int32_t { kOk = 0, kDiskError = 1, kShortRead = 2, kCorrupt = 3 };

struct Setup {  // as in cache/native/library.py
    int64_t data_offset;
    int64_t record_nbytes;
    const uint64_t* checksums;  // xxh3_64 of each record
    int64_t num_records;
    double link_bandwidth;  // bytes/s; 0: the device's own
    double rate_weight;
    int64_t rate_sample_nbytes;
    const int32_t* depths;  // ascending
    int64_t trial_nbytes;
    double worth;
    double certain;
    int32_t num_depths;
    int32_t max_depth;
    int32_t max_uncertain;
    int32_t max_together;
    int32_t fd;
    int32_t is_direct;
    const double* read_s_bounds;  // of the histograms of `Reads`, ascending
    int64_t num_bounds;
};

struct Request {  // as in cache/native/library.py
    uint64_t id;
    int64_t position;
    void* buffer;
    double benefit;
    int64_t is_demand;
};

struct Arrival {  // as in cache/native/library.py
    uint64_t id;
    int32_t status;
    int32_t detail;  // errno, or how many bytes were read
};

struct Counts {  // as in cache/native/library.py
    int64_t num_reads, num_ahead, num_retries, num_errors, num_cancelled;
    int64_t in_flight_nbytes;
    double read_s, latency_s, bandwidth;
    int64_t depth;
};

// Reads that somebody waited for when they began, or that nobody did: in how many seconds their records were in place.
struct Reads {
    std::vector<int64_t> counts;  // of each bucket, as `cache.histogram.HistogramStats`
    double sum = 0.0;
};

class Transfer {
  public:
    explicit Transfer(const Setup& setup)
        : setup_(setup),
          checksums_(setup.checksums, setup.checksums + setup.num_records),
          queue_({setup.record_nbytes, setup.max_uncertain, setup.certain, setup.max_together},
                 Rate(setup.rate_weight, setup.rate_sample_nbytes),
                 DepthTrials({setup.depths, setup.depths + setup.num_depths}, setup.trial_nbytes, setup.worth)),
          bounds_(setup.read_s_bounds, setup.read_s_bounds + setup.num_bounds) {
        for (auto& reads : reads_) reads.counts.resize(bounds_.size() + 1);
        for (int i = 0; i < setup.max_depth; ++i) threads_.emplace_back([this] { run(); });
    }

    ~Transfer() { finish_all(); }

    // Read what was submitted and end the threads.
    void finish_all() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            is_closing_ = true;
        }
        work_.notify_all();
        for (auto& thread : threads_) thread.join();
        threads_.clear();
    }

    // All at once: neighbours among them are read together, and threads are woken once.
    void submit(const Request* requests, int num) {
        std::lock_guard<std::mutex> lock(mutex_);
        for (int i = 0; i < num; ++i) {
            const Request& r = requests[i];
            auto job = std::make_shared<Job>(Job{r.id, r.position, (char*)r.buffer, r.benefit, r.is_demand != 0});
            jobs_[r.id] = job;
            queue_.add(job);
        }
        wake();
    }

    void promote(uint64_t id) {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto found = jobs_.find(id);
        if (found == jobs_.end()) return;  // arrived
        if (queue_.promote(found->second)) wake();
        else link_.notify_all();
    }

    bool cancel(uint64_t id) {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto found = jobs_.find(id);
        if (found == jobs_.end() || !queue_.cancel(found->second)) return false;
        jobs_.erase(found);
        ++counts_.num_cancelled;
        return true;
    }

    // -> up to `max` arrivals, oldest first.
    int take(Arrival* out, int max) {
        std::lock_guard<std::mutex> lock(mutex_);
        return take_locked(out, max);
    }

    // As `take`, but waits for an arrival, or for a `notify` after the `seen`-th. Meanwhile reads what is waited for
    // itself: a thread that has to be woken begins later.
    int wait(Arrival* out, int max, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (arrivals_.empty() && num_notified_ == seen) {
            const auto jobs = queue_.next(/*only_demands=*/true);
            if (!jobs.empty()) {
                lock.unlock();
                carry_out(jobs, true);
                lock.lock();
                wake();  // a read more may be under way now, and we look for what is waited for alone
            } else {
                ++num_waiting_;
                arrived_.wait(lock);
                --num_waiting_;
            }
        }
        return take_locked(out, max);
    }

    uint64_t notify() {
        std::lock_guard<std::mutex> lock(mutex_);
        ++num_notified_;
        if (num_waiting_ > 0) arrived_.notify_all();
        return num_notified_;
    }

    Counts counts() {
        std::lock_guard<std::mutex> lock(mutex_);
        Counts counts = counts_;
        counts.in_flight_nbytes = queue_.in_flight_nbytes();
        counts.bandwidth = queue_.bandwidth();
        counts.depth = queue_.depth();
        return counts;
    }

    // counts [2, num_bounds + 1], sums [2]: of reads that nobody waited for, and of the others.
    void reads(int64_t* counts, double* sums) {
        std::lock_guard<std::mutex> lock(mutex_);
        for (const auto& reads : reads_) {
            counts = std::copy(reads.counts.begin(), reads.counts.end(), counts);
            *sums++ = reads.sum;
        }
    }

  private:
    int take_locked(Arrival* out, int max) {
        const int num = std::min(max, (int)arrivals_.size());
        for (int i = 0; i < num; ++i) {
            out[i] = arrivals_.front();
            arrivals_.pop_front();
        }
        return num;
    }

    void run() {
        while (true) {
            bool is_demand = false;
            const auto jobs = next(&is_demand);
            if (jobs.empty()) return;
            carry_out(jobs, is_demand);
        }
    }

    void carry_out(const std::vector<JobPtr>& jobs, bool is_demand) {
        const auto started = Clock::now();
        std::vector<Arrival> arrivals;
        for (const auto& job : jobs) arrivals.push_back({job->id, kOk, 0});
        read(jobs, 0, jobs.size(), arrivals);
        int num_retries = 0;
        for (size_t i = 0; i < jobs.size(); ++i) {
            if (arrivals[i].status == kOk) continue;
            ++num_retries;
            read(jobs, i, 1, arrivals);
        }
        const double seconds = seconds_since(started);
        if (setup_.link_bandwidth > 0) cross_link(jobs);
        finish(jobs, arrivals, is_demand, seconds, seconds_since(started), num_retries);
    }

    std::vector<JobPtr> next(bool* is_demand) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            auto jobs = queue_.next();
            if (!jobs.empty()) {
                *is_demand = jobs.front()->is_demand;
                wake();
                return jobs;
            }
            if (is_closing_ && queue_.is_empty()) {
                work_.notify_all();  // those that were told before, and might not read beside others then
                return {};
            }
            ++num_idle_;
            work_.wait(lock);
            --num_idle_;
            num_waking_ = std::max(0, num_waking_ - 1);
        }
    }

    // One more thread, if it may begin to read; it wakes the next. All at once would cost more than small reads.
    void wake() {
        if (num_waking_ >= std::min(num_idle_, queue_.num_may_begin())) return;
        ++num_waking_;
        work_.notify_one();
    }

    // Neighbours jobs[first, first + num) in one go, and what is wrong with each.
    void read(const std::vector<JobPtr>& jobs, size_t first, size_t num, std::vector<Arrival>& arrivals) {
        const int64_t nbytes = setup_.record_nbytes, total = nbytes * (int64_t)num;
        const int64_t offset = setup_.data_offset + jobs[first]->position * nbytes;
        int64_t done = 0;
        int error = 0;
        std::vector<iovec> parts;
        while (done < total) {
            parts.clear();
            for (size_t i = (size_t)(done / nbytes); i < num; ++i) {
                const int64_t within = i == (size_t)(done / nbytes) ? done % nbytes : 0;
                parts.push_back({jobs[first + i]->buffer + within, (size_t)(nbytes - within)});
            }
            const ssize_t count = preadv(setup_.fd, parts.data(), (int)parts.size(), offset + done);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) error = errno;
            if (count <= 0) break;
            done += count;
            if (setup_.is_direct && done < total && done % kAlignment) break;
        }
        for (size_t i = 0; i < num; ++i) {
            Arrival& arrival = arrivals[first + i];
            const int64_t here = std::max<int64_t>(0, done - (int64_t)i * nbytes);
            if (here < nbytes) {
                arrival.status = error ? kDiskError : kShortRead;
                arrival.detail = error ? error : (int32_t)here;
            } else if (XXH3_64bits(jobs[first + i]->buffer, (size_t)nbytes) != checksums_[(size_t)jobs[first + i]->position]) {
                arrival.status = kCorrupt;
            } else {
                arrival.status = kOk;
            }
        }
    }

    // Wait until the records have crossed the link, one after the other; who is waited for goes first. Each crossing begins
    // when the one before ended, however late that was noticed: waking takes longer than a small record on a fast link.
    void cross_link(const std::vector<JobPtr>& jobs) {
        std::unique_lock<std::mutex> lock(mutex_);
        const auto ready = Clock::now();
        const auto is_waited_for = [&] {
            return std::any_of(jobs.begin(), jobs.end(), [](const JobPtr& job) { return job->is_demand; });
        };
        bool is_demand = false;
        while (true) {
            if (!is_demand && is_waited_for()) {  // from the start, or promoted
                is_demand = true;
                ++num_demands_at_link_;
            }
            const auto turn = link_free_at_ - kAnnounced;
            if (Clock::now() < turn) link_.wait_until(lock, turn);
            else if (!is_demand && num_demands_at_link_ > 0) link_.wait(lock);
            else break;
        }
        const double seconds = (double)jobs.size() * (double)setup_.record_nbytes / setup_.link_bandwidth;
        const auto crossed = std::max(ready, link_free_at_) + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
        link_free_at_ = crossed;
        num_demands_at_link_ -= is_demand;
        if (is_demand) link_.notify_all();
        lock.unlock();
        if (crossed - Clock::now() > kWorthSleeping) std::this_thread::sleep_until(crossed);
    }

    void finish(const std::vector<JobPtr>& jobs, const std::vector<Arrival>& arrivals, bool is_demand, double seconds, double until_in_place_s, int num_retries) {
        std::lock_guard<std::mutex> lock(mutex_);
        Reads& reads = reads_[is_demand];
        ++reads.counts[(size_t)(std::lower_bound(bounds_.begin(), bounds_.end(), until_in_place_s) - bounds_.begin())];
        reads.sum += until_in_place_s;
        queue_.finished(jobs.size(), is_demand);
        counts_.num_reads += (int64_t)jobs.size();
        counts_.num_ahead += is_demand ? 0 : (int64_t)jobs.size();
        counts_.num_retries += num_retries;
        counts_.read_s += seconds;
        counts_.latency_s += (seconds - counts_.latency_s) * (counts_.latency_s > 0 ? setup_.rate_weight : 1.0);
        for (const auto& arrival : arrivals) {
            counts_.num_errors += arrival.status != kOk;
            jobs_.erase(arrival.id);
            arrivals_.push_back(arrival);
        }
        if (num_waiting_ > 0) arrived_.notify_all();
    }

    const Setup setup_;
    const std::vector<uint64_t> checksums_;
    std::mutex mutex_;  // guards all of what follows
    std::condition_variable work_, link_, arrived_;
    Queue queue_;
    std::unordered_map<uint64_t, JobPtr> jobs_;  // not arrived yet
    std::deque<Arrival> arrivals_;
    Counts counts_{};
    const std::vector<double> bounds_;
    Reads reads_[2];  // nobody waited, somebody did
    uint64_t num_notified_ = 0;
    int num_waiting_ = 0;  // in `take`
    int num_idle_ = 0, num_waking_ = 0;  // threads that wait for work; of them those told, that have not looked yet
    int num_demands_at_link_ = 0;
    Clock::time_point link_free_at_{};
    bool is_closing_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace foregate

using foregate::Transfer;

extern "C" {
void* foregate_transfer_open(const foregate::Setup* setup) { return new Transfer(*setup); }
void foregate_transfer_finish(void* transfer) { ((Transfer*)transfer)->finish_all(); }
void foregate_transfer_close(void* transfer) { delete (Transfer*)transfer; }
void foregate_transfer_submit(void* transfer, const foregate::Request* requests, int num) {
    ((Transfer*)transfer)->submit(requests, num);
}
void foregate_transfer_promote(void* transfer, uint64_t id) { ((Transfer*)transfer)->promote(id); }
int foregate_transfer_cancel(void* transfer, uint64_t id) { return ((Transfer*)transfer)->cancel(id); }
int foregate_transfer_take(void* transfer, foregate::Arrival* out, int max) { return ((Transfer*)transfer)->take(out, max); }
int foregate_transfer_wait(void* transfer, foregate::Arrival* out, int max, uint64_t seen) {
    return ((Transfer*)transfer)->wait(out, max, seen);
}
uint64_t foregate_transfer_notify(void* transfer) { return ((Transfer*)transfer)->notify(); }
void foregate_transfer_reads(void* transfer, int64_t* counts, double* sums) { ((Transfer*)transfer)->reads(counts, sums); }
void foregate_transfer_counts(void* transfer, foregate::Counts* out) { *out = ((Transfer*)transfer)->counts(); }
}
