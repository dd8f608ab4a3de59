// NEON with the dot product of Armv8.2 (Neoverse N1, Apple M1 and later).
#include <arm_neon.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#define LOOKUPFFN_NAME "neon_dot"
#define LOOKUPFFN_DOT
namespace lookupffn { namespace neon_dot {
#include "simd_neon.h"
#include "kernels-inl.h"
#include "probe-inl.h"
#include "training-inl.h"
} }
#pragma GCC pop_options

namespace lookupffn {
extern const Kernels* const kNeonDot;
const Kernels* const kNeonDot = &neon_dot::kKernels;
}
