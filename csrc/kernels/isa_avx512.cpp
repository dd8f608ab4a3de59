// AVX-512 as every processor with it has it (Skylake-SP and later): F, BW, DQ, VL.
#include <immintrin.h>

#include LOOKUPFFN_TABLES

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace lookupffn {
namespace avx512 {
#include "simd/avx512.h"
#include LOOKUPFFN_LOOPS
}  // namespace avx512
}  // namespace lookupffn
#pragma GCC pop_options

LOOKUPFFN_EXPORT(avx512)
