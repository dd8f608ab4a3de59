// AVX2 and FMA (Haswell, Zen and later).
#include <immintrin.h>

#include LOOKUPFFN_TABLES

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace lookupffn {
namespace avx2 {
#include "simd/avx2.h"
#include LOOKUPFFN_LOOPS
}  // namespace avx2
}  // namespace lookupffn
#pragma GCC pop_options

LOOKUPFFN_EXPORT(avx2)
