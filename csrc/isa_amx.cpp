// AMX for the int8 projection, AVX-512 with VNNI for all the rest (Sapphire Rapids and later).
#include <immintrin.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#define LOOKUPFFN_NAME "amx"
#define LOOKUPFFN_VNNI
#define LOOKUPFFN_TILES
namespace lookupffn { namespace amx {
#include "simd_avx512.h"
#include "tiles_amx.h"
#include "kernels-inl.h"
#include "probe-inl.h"
#include "training-inl.h"
} }
#pragma GCC pop_options

namespace lookupffn {
extern const Kernels* const kAmx;
const Kernels* const kAmx = &amx::kKernels;
}
