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
namespace avx2 {
#include "vec.h"

#include "attention.inl"
#include "product.inl"
#include "gemm.inl"
#include "pack.inl"
#include "choose.inl"
}  // namespace avx2

const KernelTable kAvx2 = {"avx2",      avx2::expert_mlp, avx2::linear,  avx2::rms_norm,
                           avx2::prepare_qkv, avx2::attention,  avx2::combine, avx2::swiglu,
                           avx2::pack,        avx2::choose};
}  // namespace foregate
