// AVX2 with AVX-VNNI's dot products (Alder Lake and later client processors).
#include <immintrin.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#define LOOKUPFFN_NAME "avx2_vnni"
#define LOOKUPFFN_VNNI
namespace lookupffn { namespace avx2_vnni {
#include "simd_avx2.h"
#include "kernels-inl.h"
#include "probe-inl.h"
#include "training-inl.h"
} }
#pragma GCC pop_options

namespace lookupffn {
extern const Kernels* const kAvx2Vnni;
const Kernels* const kAvx2Vnni = &avx2_vnni::kKernels;
}
