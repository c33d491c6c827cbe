// The kernels for one instruction set; the flags to compile it with are in setup.py.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <immintrin.h>
#include "kernels.h"
#include "thread_pool.h"

namespace foregate {
namespace avx512 {
#include "vec.h"

#include "attention.inl"
#include "product.inl"
#include "gemm.inl"
#include "pack.inl"
#include "choose.inl"
}  // namespace avx512

const KernelTable kAvx512 = {"avx512",      avx512::expert_mlp, avx512::linear,  avx512::rms_norm,
                           avx512::prepare_qkv, avx512::attention,  avx512::combine, avx512::swiglu,
                           avx512::pack,        avx512::choose};
}  // namespace foregate
