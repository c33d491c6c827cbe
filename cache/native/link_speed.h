// What a link was measured to do: the C++ twin of cache/link_speed.py, whose constants it is given.
#pragma once

#include <chrono>
#include <cstdint>
#include <utility>
#include <vector>

namespace foregate {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point then) {
    return std::chrono::duration<double>(Clock::now() - then).count();
}

// Bytes per second of the time in which something is under way.
class Rate {
  public:
    Rate(double weight, int64_t sample_nbytes) : weight_(weight), sample_nbytes_(sample_nbytes) {}

    double average() const { return past_s_ > 0 ? past_nbytes_ / past_s_ : 0; }  // 0 before the first sample

    void begin() {
        if (is_busy_) return;
        is_busy_ = true;
        since_ = Clock::now();
    }

    void add(int64_t nbytes, bool is_idle) {
        const auto now = Clock::now();
        busy_s_ += std::chrono::duration<double>(now - since_).count();
        since_ = now;
        is_busy_ = !is_idle;
        nbytes_ += nbytes;
        if (nbytes_ < sample_nbytes_ || busy_s_ <= 0) return;
        // bytes over seconds, not an average of rates: reads that end together would count for more than the link can do
        const double weight = past_s_ == 0 ? 1.0 : weight_;
        past_nbytes_ += weight * ((double)nbytes_ - past_nbytes_);
        past_s_ += weight * (busy_s_ - past_s_);
        nbytes_ = 0;
        busy_s_ = 0;
    }

  private:
    const double weight_;
    const int64_t sample_nbytes_;
    double past_nbytes_ = 0, past_s_ = 0;  // of the samples so far, decayed
    double busy_s_ = 0;
    int64_t nbytes_ = 0;
    bool is_busy_ = false;
    Clock::time_point since_{};
};

// Tries each depth while there is a queue, then keeps the smallest that is about as fast as the fastest.
class DepthTrials {
  public:
    DepthTrials(std::vector<int> depths, int64_t trial_nbytes, double worth)
        : depths_(std::move(depths)), trial_nbytes_(trial_nbytes), worth_(worth), depth_(depths_.front()) {}

    int depth() const { return depth_; }

    void add(int64_t nbytes, bool has_queue) {
        if (rates_.size() == depths_.size()) return;  // settled
        if (!is_measuring_ || !has_queue) {
            is_measuring_ = has_queue;
            since_ = Clock::now();
            nbytes_ = 0;
            return;
        }
        nbytes_ += nbytes;
        if (nbytes_ < trial_nbytes_) return;
        rates_.push_back((double)nbytes_ / seconds_since(since_));
        is_measuring_ = false;
        depth_ = rates_.size() < depths_.size() ? depths_[rates_.size()] : smallest_of_the_fast();
    }

  private:
    int smallest_of_the_fast() const {
        double fastest = 0;
        for (double rate : rates_) fastest = rate > fastest ? rate : fastest;
        for (size_t i = 0; i < depths_.size(); ++i)
            if (rates_[i] * worth_ >= fastest) return depths_[i];
        return depths_.back();
    }

    const std::vector<int> depths_;  // ascending
    const int64_t trial_nbytes_;
    const double worth_;
    std::vector<double> rates_;  // of the depths tried so far
    int depth_;
    int64_t nbytes_ = 0;
    bool is_measuring_ = false;
    Clock::time_point since_{};
};

}  // namespace foregate
