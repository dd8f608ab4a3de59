// AVX2 and FMA (Haswell, Zen and later).
#include <immintrin.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LOOKUPFFN_NAME "avx2"
namespace lookupffn { namespace avx2 {
#include "simd_avx2.h"
#include "kernels-inl.h"
#include "probe-inl.h"
#include "training-inl.h"
} }
#pragma GCC pop_options

namespace lookupffn {
extern const Kernels* const kAvx2;
const Kernels* const kAvx2 = &avx2::kKernels;
}
