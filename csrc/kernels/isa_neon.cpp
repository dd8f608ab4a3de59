// NEON as every 64-bit Arm processor has it.
#include <arm_neon.h>

#include LOOKUPFFN_TABLES

namespace lookupffn {
namespace neon {
#include "simd/neon.h"
#include LOOKUPFFN_LOOPS
}  // namespace neon
}  // namespace lookupffn

LOOKUPFFN_EXPORT(neon)
