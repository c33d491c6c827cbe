// Routing: which experts each token goes to, and the tokens of each expert. Small integers; no vectors needed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace foregate {

// mode 0: softmax over all experts, the k largest as they are; 1: divided by their sum; 2: the k largest logits, weight 1.
// Ties go to the lower expert. ids, weights [num_tokens, k], best first.
void route(const float* logits, int num_tokens, int num_experts, int num_active, int mode, int32_t* ids, float* weights) {
    static thread_local std::vector<float> scores;
    static thread_local std::vector<int32_t> order;
    scores.resize(num_experts);
    order.resize(num_experts);
    for (int t = 0; t < num_tokens; ++t) {
        const float* row = logits + (size_t)t * num_experts;
        float total = 0.0f;
        if (mode == 2) {
            std::copy(row, row + num_experts, scores.begin());
        } else {
            const float top = *std::max_element(row, row + num_experts);
            for (int e = 0; e < num_experts; ++e) total += scores[e] = std::exp(row[e] - top);
        }
        for (int e = 0; e < num_experts; ++e) order[e] = e;
        std::partial_sort(order.begin(), order.begin() + num_active, order.end(), [&](int32_t a, int32_t b) {
            return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
        });
        int32_t* to = ids + (size_t)t * num_active;
        float* weight = weights + (size_t)t * num_active;
        float sum = 0.0f;
        for (int i = 0; i < num_active; ++i) {
            to[i] = order[i];
            weight[i] = mode == 2 ? 1.0f : scores[order[i]] / total;
            sum += weight[i];
        }
        if (mode == 1)
            for (int i = 0; i < num_active; ++i) weight[i] /= sum;
    }
}

// ids [num_positions] -> the distinct experts in ascending order, and for each the positions that chose it, ascending:
// positions[row_begin[i] .. row_begin[i + 1]]. Returns how many experts.
int group_by_expert(const int32_t* ids, int num_positions, int num_experts, int32_t* experts, int32_t* row_begin,
                    int32_t* positions) {
    static thread_local std::vector<int32_t> next;
    next.assign(num_experts, 0);
    for (int i = 0; i < num_positions; ++i) ++next[ids[i]];
    int num_found = 0, begin = 0;
    for (int e = 0; e < num_experts; ++e) {
        const int count = next[e];
        if (count == 0) continue;
        experts[num_found] = e;
        row_begin[num_found++] = begin;
        next[e] = begin;
        begin += count;
    }
    row_begin[num_found] = begin;
    for (int i = 0; i < num_positions; ++i) positions[next[ids[i]]++] = i;
    return num_found;
}

}  // namespace foregate
