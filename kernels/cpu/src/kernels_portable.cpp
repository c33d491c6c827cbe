// The kernels for one instruction set; the flags to compile it with are in setup.py.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace foregate {
namespace portable {
#include "vec.h"

#include "attention.inl"
#include "product.inl"
#include "gemm.inl"
#include "pack.inl"
#include "choose.inl"
}  // namespace portable

const KernelTable kPortable = {"portable",      portable::expert_mlp, portable::linear,  portable::rms_norm,
                           portable::prepare_qkv, portable::attention,  portable::combine, portable::swiglu,
                           portable::pack,        portable::choose};
}  // namespace foregate
