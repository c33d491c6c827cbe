// What every instruction set offers. All kernels compute the same bits for any number of rows and threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace foregate {

class ThreadPool;

enum Format : int { kFloat32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };

// Rows of each expert, as a router found them: expert i's are positions[row_begin[i]..row_begin[i + 1]].
struct Routing {
    int num_experts;
    const int32_t* experts;    // [num_experts] ascending
    const int32_t* row_begin;  // [num_experts + 1] into positions
    const int32_t* positions;  // token * num_active + rank, ascending for each expert
};

// One expert call: the rows routed to each expert, and where its products go.
struct ExpertCall {
    int format, hidden_size, intermediate_size;
    const float* x;  // [num_tokens, hidden]
    int num_tokens, num_active;
    Routing routing;
    int num_ready;
    const int32_t* ready;            // [num_ready] experts to be computed, each one of routing's
    const uint8_t* const* records;   // [num_ready]
    float* out;                      // [num_tokens * num_active, hidden]
    // if not null, all of the tokens' products are in `out` after this call, and are added here; `out` is scratch then
    float* residual;                 // [num_tokens, hidden]
    const float* weights;            // [num_tokens, num_active]
};

struct LinearCall {
    int format, num_outputs, num_inputs;
    const uint8_t* weight;  // packed
    const float* bias;      // [num_outputs] or null
    const float* x;         // [num_rows, num_inputs]
    int64_t x_stride;       // floats
    int num_rows;
    float* out;             // [num_rows, num_outputs]
    int64_t out_stride;
    int accumulate;         // out += product
};

struct AttentionCall {
    int num_heads, num_kv_heads, head_dim, kv_is_bf16;
    float scale;
    const float* query;           // [rows, heads, head_dim]
    const void* keys;             // [blocks, kv_heads, head_dim, 16]
    const void* values;           // [blocks, kv_heads, 16, head_dim]
    int num_seqs;
    const int32_t* row_begin;     // [num_seqs + 1]
    const int32_t* context;       // [num_seqs] tokens, the new ones included
    const int32_t* block_begin;   // [num_seqs + 1] into blocks
    const int32_t* blocks;
    float* out;                   // [rows, heads, head_dim]
};

struct QkvCall {
    int num_heads, num_kv_heads, head_dim, kv_is_bf16;
    int norm;                     // 0 none, 1 each head, 2 all heads together
    float eps, clip;              // clip 0: none
    const float *q_norm, *k_norm;
    const float *cos, *sin;       // [positions, head_dim]
    const float* qkv;             // [rows, (heads + 2 kv_heads) * head_dim]
    int num_rows;
    const int32_t* positions;     // [rows]
    const int32_t* slots;         // [rows] block * 16 + offset
    float* query;                 // [rows, heads, head_dim]
    void *keys, *values;
};

// The step that all layers of a model share.
struct Step {
    int num_rows;
    const int32_t* positions;    // [num_rows]
    const int32_t* slots;        // [num_rows]
    int num_seqs;
    const int32_t* row_begin;    // [num_seqs + 1]
    const int32_t* context;      // [num_seqs]
    const int32_t* block_begin;  // [num_seqs + 1]
    const int32_t* blocks;
};

// Norm, projections, rotation, attention and output of a layer. What depends on the step is filled in by the call.
struct AttentionLayer {
    int hidden_size;
    float eps;
    const float* norm;  // [hidden]
    LinearCall qkv, output;
    QkvCall prepare;
    AttentionCall attention;
};

// Norm, router and choice of a layer.
struct RouterLayer {
    float eps;
    const float* norm;  // [hidden]
    LinearCall router;
    int num_active, mode;
};

// A dense SwiGLU layer, with its norm or, if that is null, of normed rows.
struct MlpLayer {
    float eps;
    const float* norm;
    LinearCall gate_up, down;
};

// Float weights to a packed matrix of an integer format.
struct PackCall {
    int format, num_outputs, num_inputs;
    const float* weight;  // [num_outputs, num_inputs]
    uint8_t* out;
};

// How a token is drawn from a row of logits.
struct Draw {
    double uniform;      // in [0, 1)
    double temperature;  // 0: the likeliest token, of equals the first
    double top_p, min_p;
    int64_t top_k;       // 0: all
    const uint32_t* allowed;  // a bit for each token, the lowest first: those not set never come; null: all may
};

struct ChooseCall {
    int num_rows, vocab_size;
    const float* const* logits;  // [num_rows], each [vocab_size]; minus infinity: never
    const Draw* draws;           // [num_rows]
    int32_t* tokens;             // [num_rows], -1 where no logit is finite or one is no number
};

struct KernelTable {
    const char* name;
    void (*expert_mlp)(ThreadPool&, const ExpertCall&);
    void (*linear)(ThreadPool&, const LinearCall&);
    void (*rms_norm)(ThreadPool&, const float* x, const float* weight, float eps, int num_rows, int size, float* out);
    void (*prepare_qkv)(ThreadPool&, const QkvCall&);
    void (*attention)(ThreadPool&, const AttentionCall&);
    void (*combine)(ThreadPool&, const float* outputs, const float* weights, int num_tokens, int num_active, int size,
                    float* out);
    void (*swiglu)(ThreadPool&, const float* gate_up, int num_rows, int size, float* out);
    void (*pack)(ThreadPool&, const PackCall&);
    void (*choose)(ThreadPool&, const ChooseCall&);
};

extern const KernelTable kPortable;
extern const KernelTable kAvx2;
extern const KernelTable kAvx512;
extern const KernelTable kAmx;

}  // namespace foregate
