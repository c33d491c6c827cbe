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
namespace amx {
#include "vec.h"

#include "attention.inl"
#include "product.inl"
#include "gemm.inl"
#include "pack.inl"
#include "choose.inl"
}  // namespace amx

const KernelTable kAmx = {"amx",      amx::expert_mlp, amx::linear,  amx::rms_norm,
                           amx::prepare_qkv, amx::attention,  amx::combine, amx::swiglu,
                           amx::pack,        amx::choose};
}  // namespace foregate
