// AVX-512 with its 8-bit and 16-bit dot products (Cascade Lake, Ice Lake, Zen 4 and later).
#include <immintrin.h>

#include LOOKUPFFN_TABLES

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#define LOOKUPFFN_VNNI
namespace lookupffn {
namespace avx512_vnni {
#include "simd/avx512.h"
#include LOOKUPFFN_LOOPS
}  // namespace avx512_vnni
}  // namespace lookupffn
#pragma GCC pop_options

LOOKUPFFN_EXPORT(avx512_vnni)
