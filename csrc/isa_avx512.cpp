// AVX-512 as every processor with it has it (Skylake-SP and later): F, BW, DQ, VL.
#include <immintrin.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define LOOKUPFFN_NAME "avx512"
namespace lookupffn { namespace avx512 {
#include "simd_avx512.h"
#include "kernels-inl.h"
#include "probe-inl.h"
#include "training-inl.h"
} }
#pragma GCC pop_options

namespace lookupffn {
extern const Kernels* const kAvx512;
const Kernels* const kAvx512 = &avx512::kKernels;
}
