// AMX for the int8 projection, AVX-512 with VNNI for all the rest (Sapphire Rapids and later).
#include <immintrin.h>

#include LOOKUPFFN_TABLES

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#define LOOKUPFFN_VNNI
#define LOOKUPFFN_TILES
namespace lookupffn {
namespace amx {
#include "simd/avx512.h"
#include "simd/tiles_amx.h"
#include LOOKUPFFN_LOOPS
}  // namespace amx
}  // namespace lookupffn
#pragma GCC pop_options

LOOKUPFFN_EXPORT(amx)
