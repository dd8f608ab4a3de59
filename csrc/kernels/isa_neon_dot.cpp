// NEON with the dot product of Armv8.2 (Neoverse N1, Apple M1 and later).
#include <arm_neon.h>

#include LOOKUPFFN_TABLES

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#define LOOKUPFFN_DOT
namespace lookupffn {
namespace neon_dot {
#include "simd/neon.h"
#include LOOKUPFFN_LOOPS
}  // namespace neon_dot
}  // namespace lookupffn
#pragma GCC pop_options

LOOKUPFFN_EXPORT(neon_dot)
