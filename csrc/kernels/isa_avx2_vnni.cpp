// AVX2 with AVX-VNNI's dot products (Alder Lake and later client processors).
#include <immintrin.h>

#include LOOKUPFFN_TABLES

#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#define LOOKUPFFN_VNNI
namespace lookupffn {
namespace avx2_vnni {
#include "simd/avx2.h"
#include LOOKUPFFN_LOOPS
}  // namespace avx2_vnni
}  // namespace lookupffn
#pragma GCC pop_options

LOOKUPFFN_EXPORT(avx2_vnni)
