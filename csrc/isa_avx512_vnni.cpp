// AVX-512 with its 8-bit and 16-bit dot products (Cascade Lake, Ice Lake, Zen 4 and later).
#include <immintrin.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#define LOOKUPFFN_NAME "avx512_vnni"
#define LOOKUPFFN_VNNI
namespace lookupffn { namespace avx512_vnni {
#include "simd_avx512.h"
#include "kernels-inl.h"
#include "probe-inl.h"
#include "training-inl.h"
} }
#pragma GCC pop_options

namespace lookupffn {
extern const Kernels* const kAvx512Vnni;
const Kernels* const kAvx512Vnni = &avx512_vnni::kKernels;
}
